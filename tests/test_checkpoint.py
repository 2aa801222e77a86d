"""Saved and opened again the logits are the same bit for bit; damage is an error, never a wrong model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pruner_lib.checkpoint import CheckpointError, load_pruned, save_pruned, saving
from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, prune

UNIFORM = {
    f"layers.{i}.{kind}": groups
    for i in range(3)
    for kind, groups in (("attention_head", [1]), ("mlp_neuron", [0, 4, 9, 11]))
}
UNEVEN = {"layers.0.attention_head": [1], "layers.1.mlp_neuron": [0, 2, 4], "layers.2.query_head": [0, 3]}
UNEVEN_NEURONS = {"layers.1.mlp_neuron": [0, 2, 4]}


def tiny(kind: str = "llama", **changes: object) -> PreTrainedModel:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    ids = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **ids, **changes})).eval()


def pruned(removal: dict[str, list[int]], kind: str = "llama", **changes: object) -> PreTrainedModel:
    model = tiny(kind, **changes)
    return prune(model, PruningPlan.from_removal(discover(model), removal))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, 15).reshape(2, 6)).logits


def elsewhere(folder: Path, preamble: str = "") -> subprocess.CompletedProcess[str]:
    """Open a folder in a new process; saves its logits beside it."""
    code = (
        f"{preamble}\nimport sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"assert {bool(preamble)} or not any(name.startswith('pruner_lib') for name in sys.modules)\n"
        "with torch.no_grad():\n"
        f"    torch.save(model(torch.arange(3, 15).reshape(2, 6)).logits, {str(folder) + '.logits'!r})\n"
    )
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )


@pytest.mark.parametrize(
    ("removal", "kind", "changes"),
    [
        (UNIFORM, "llama", {}),
        (UNEVEN, "llama", {}),
        (UNEVEN, "llama", {"tie_word_embeddings": True}),
        (UNEVEN_NEURONS, "gpt2", {}),
        ({"hidden_channel": [0, 7]}, "llama", {}),
    ],
)
def test_logits_are_the_same_after_reload(
    tmp_path: Path, removal: dict[str, list[int]], kind: str, changes: dict[str, object]
) -> None:
    model = pruned(removal, kind, **changes)
    save_pruned(model, tmp_path / "saved")
    opened = load_pruned(tmp_path / "saved")
    assert torch.equal(logits(opened), logits(model))
    assert not opened.training
    ids = torch.arange(3, 9).reshape(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(opened.generate(ids, **options), model.generate(ids, **options))


def test_one_width_opens_where_the_library_was_never_imported(tmp_path: Path) -> None:
    model = pruned(UNIFORM)
    save_pruned(model, tmp_path / "saved")
    done = elsewhere(tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "saved.logits"), logits(model))


@pytest.mark.parametrize("removal", [UNEVEN, UNEVEN_NEURONS], ids=["heads", "neurons"])
def test_layers_of_different_width_fail_loudly_without_the_library(
    tmp_path: Path, removal: dict[str, list[int]]
) -> None:
    save_pruned(pruned(removal), tmp_path / "saved")
    without = elsewhere(tmp_path / "saved")
    assert without.returncode != 0 and "per-layer attribute" in without.stderr
    assert not (tmp_path / "saved.logits").exists()


def test_layers_of_different_width_open_once_the_library_is_imported(tmp_path: Path) -> None:
    model = pruned(UNEVEN)
    save_pruned(model, tmp_path / "saved")
    imported = elsewhere(tmp_path / "saved", "import pruner_lib")
    assert imported.returncode == 0, imported.stderr
    assert torch.equal(torch.load(tmp_path / "saved.logits"), logits(model))


def test_a_head_count_that_transformers_forbids_opens_with_the_library(tmp_path: Path) -> None:
    model = pruned({f"layers.{i}.attention_head": [0] for i in range(3)}, num_key_value_heads=4)
    assert model.config.num_attention_heads == 3  # 32 is no multiple of 3
    save_pruned(model, tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))
    without = elsewhere(tmp_path / "saved")
    assert without.returncode != 0 and "not a multiple" in without.stderr


def test_the_default_head_size_is_written_out(tmp_path: Path) -> None:
    # 128 is the class's default, which transformers leaves out of config.json and derives anew on reading.
    model = pruned(
        {f"layers.{i}.attention_head": [0, 1] for i in range(3)},
        hidden_size=512,
        head_dim=None,
        num_key_value_heads=4,
    )
    assert model.config.head_dim == 128
    save_pruned(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["head_dim"] == 128
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))


def test_plan_and_provenance_are_saved(tmp_path: Path) -> None:
    model = tiny()
    dependencies = discover(model)
    plan = PruningPlan.from_removal(dependencies, UNEVEN)
    save_pruned(prune(model, plan), tmp_path / "saved", plan=plan, provenance={"base": "tiny", "seed": 0})
    read = PruningPlan.load(tmp_path / "saved" / "pruning_plan.json", dependencies)
    assert dict(read.removal) == dict(plan.removal)
    record = json.loads((tmp_path / "saved" / "provenance.json").read_text())
    assert record["provenance"] == {"base": "tiny", "seed": 0}
    assert record["parameters"] == plan.params_after


def test_what_no_configuration_can_say_is_not_saved(tmp_path: Path) -> None:
    model = pruned({"layers.0.attention_head": [1]}, "gpt2")
    with pytest.raises(CheckpointError, match="no way to say the new sizes"):
        save_pruned(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_provenance_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_pruned(pruned(UNIFORM), tmp_path / "saved", provenance={"model": object()})
    assert list(tmp_path.iterdir()) == []


def test_an_unrelated_folder_or_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "note").write_text("a file")
    for name in ("thesis", "note"):
        with pytest.raises(CheckpointError, match="cannot save into"):
            save_pruned(pruned(UNIFORM), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "note"}


def test_an_earlier_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    save_pruned(pruned(UNEVEN), tmp_path / "saved", provenance={"run": 1})
    (tmp_path / "saved" / "left_over.txt").write_text("from the first run")
    model = pruned(UNIFORM)
    save_pruned(model, tmp_path / "saved", provenance={"run": 2})
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))
    assert not (tmp_path / "saved" / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
@pytest.mark.parametrize("step", ["_write", "_flush", "_swap"])
def test_a_failure_while_saving_leaves_the_old_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, exchange: bool
) -> None:
    old = pruned(UNEVEN)
    save_pruned(old, tmp_path / "saved")
    original = getattr(saving, step)

    def failing(*args: object) -> None:
        if step != "_swap":
            original(*args)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, step, failing)
        if not exchange:
            patch.setattr(saving, "_exchange", lambda first, second: False)
        with pytest.raises(OSError, match="no space"):
            save_pruned(pruned(UNIFORM), tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(old))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_death_between_two_renames_is_repaired(tmp_path: Path) -> None:
    old = pruned(UNIFORM)
    save_pruned(old, tmp_path / "saved")
    os.replace(tmp_path / "saved", tmp_path / ".saved.old")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(old))


def test_a_killed_process_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    old = pruned(UNIFORM)
    save_pruned(old, tmp_path / "saved")
    code = (
        "import os, signal\nfrom pruner_lib.checkpoint import load_pruned, save_pruned, saving\n"
        f"model = load_pruned({str(tmp_path / 'saved')!r})\n"
        "model.lm_head.weight.data.zero_()\n"
        "saving._flush = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"save_pruned(model, {str(tmp_path / 'saved')!r})\n"
    )
    root = str(Path(__file__).parents[1])
    died = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert died.returncode == -9
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(old))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pruned(pruned(UNIFORM), tmp_path / "saved")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pruned(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "state.pkl"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match="pickled files"):
        load_pruned(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_pruned(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 40, -1])
def test_a_truncated_file(folder: Path, name: str, length: int) -> None:
    data = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(data[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        load_pruned(folder)


def test_a_wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj"):
        load_pruned(folder)


@pytest.mark.parametrize(("change", "words"), [("drop", "lacks the weights"), ("add", "no place for")])
def test_weights_that_are_missing_or_too_many(folder: Path, change: str, words: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if change == "drop":
        del weights["model.layers.1.mlp.up_proj.weight"]
    else:
        weights["model.layers.1.mlp.side_proj.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        load_pruned(folder)


def test_an_altered_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mlp"):
        load_pruned(folder)


def test_a_meta_model_has_nothing_to_save(tmp_path: Path) -> None:
    from pruner_lib.pruning.slicing import meta_copy

    with pytest.raises(CheckpointError, match="meta device"):
        save_pruned(meta_copy(tiny()), tmp_path / "saved")


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "cut": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    save_pruned(pruned(UNIFORM), tmp_path / "saved", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("cut").input_ids == [1]


def test_the_model_that_is_saved_is_not_changed(tmp_path: Path) -> None:
    model = pruned(UNEVEN)
    config = model.config.to_dict()
    save_pruned(model, tmp_path / "saved")
    assert model.config.to_dict() == config
    shutil.rmtree(tmp_path / "saved")
