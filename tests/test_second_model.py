"""Papermill runs notebooks 00 to 05 on a second, tiny model: no assertion holds for the default model only.

The model is a random Qwen3 of another depth, with other head counts and another tokenizer. What is *found*
on it means nothing; whatever a notebook asserts must hold for it all the same, or be guarded.

On this model every cell is also run twice in a row, as students do: nothing may break, and what is said
must be the same.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import nbformat
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pruner_lib.assets import load_text

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0[0-5]_*.ipynb"))
SMALL = sorted(FOLDER.glob("0[67]_*.ipynb"))  # their own models are tiny, or have no weights
# Values for a model that learns nothing; whichever of them a notebook has.
CHEAP = {"eval_windows": 4, "num_windows": 2, "recovery_steps": 2, "new_tokens": 4}


def byte_pairs(text, size=512):
    """A byte-level tokenizer learnt from a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def second_model(tmp_path_factory):
    """Its folder, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("second") / "tiny-qwen3"
    tokenizer = byte_pairs(load_text("wikitext2", "test")[:200_000])
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 9, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 12, "max_position_embeddings": 2048}  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.1,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def parameters(path):
    """Names in a notebook's cell tagged `parameters`."""
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)} - {"None"}


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory):
    """A folder for what the notebooks leave behind, while downloaded assets come from the usual cache."""
    from pruner_lib.assets.files import cache_folder

    folder = tmp_path_factory.mktemp("cache")
    for entry in cache_folder().iterdir():
        if entry.name != "work":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def run(second_model, workspaces, tmp_path, monkeypatch):
    """Executes a notebook and returns its code cells; 00 to 05 on the second model."""
    import papermill

    monkeypatch.setenv("PRUNER_LIB_CACHE", str(workspaces))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def execute(path):
        values = {name: value for name, value in CHEAP.items() if name in parameters(path)}
        model = {"model_name": str(second_model), "device": "cpu"}
        executed = papermill.execute_notebook(
            path, tmp_path / f"executed-{path.name}", {} if path.name >= "06" else model | values,
            kernel_name="python3", cwd=FOLDER, progress_bar=False, execution_timeout=300,
            extra_arguments=["--IPKernelApp.log_level=40"],
        )  # fmt: skip
        return [cell for cell in executed.cells if cell.cell_type == "code"]

    return execute


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_a_second_model(path, second_model, run):
    cells = run(path)
    assert all(cell.execution_count for cell in cells)
    assert str(second_model) in "".join(cell.source for cell in cells[:3])


def said(cell):
    """What a cell printed or returned, as text."""
    streams = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    return streams, [o.data.get("text/plain") for o in cell.outputs if "data" in o]


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("path", [*NOTEBOOKS, *SMALL], ids=lambda path: path.stem)
def test_every_cell_may_run_twice(path, run, tmp_path):
    page = nbformat.read(path, as_version=4)
    again = []
    for cell in page.cells:
        again.append(cell)
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            again.append(copy.deepcopy(cell))
            again[-1].id += "-again"
    page.cells = again
    nbformat.write(page, tmp_path / path.name)
    cells = [cell for cell in run(tmp_path / path.name) if "parameters" not in str(cell.metadata.tags)]
    assert len(cells) > 20 and len(cells) % 2 == 0
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert first.source == second.source
        if "nbval-ignore-output" not in first.metadata.tags:
            assert said(first) == said(second)
