"""A checkpoint folder says where it comes from and what is in it; damage is an error, never a wrong model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import UNEVEN, UNIFORM, pruned, tiny

from pruner_lib.checkpoint import CheckpointError, compatibility, load_pruned, save_pruned
from pruner_lib.checkpoint.record import write_record
from pruner_lib.discovery import discover
from pruner_lib.evaluation import evaluate
from pruner_lib.importance import ImportanceScores
from pruner_lib.pruning import PruningPlan, prune


def signed_again(folder: Path) -> None:
    """Make the record agree with files that were changed, as somebody does who builds a folder by hand."""
    record = json.loads((folder / "provenance.json").read_text())
    write_record(folder, record)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pruned(pruned(UNIFORM), tmp_path / "saved")


def assert_refused(folder: Path, match: str, **options: bool) -> None:
    """Not opened, and nothing in the folder or beside it is touched."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=match):
        load_pruned(folder, **options)
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pruned(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "state.pkl"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"not even a pickle")
    assert_refused(folder, match="pickled files")


FILES = ["config.json", "model.safetensors", "generation_config.json"]


@pytest.mark.parametrize("name", [*FILES, "provenance.json"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, match="missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 40, -1])
def test_a_truncated_file(folder: Path, name: str, length: int) -> None:
    data = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(data[:length])
    assert_refused(folder, match="damaged")


def test_a_wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    signed_again(folder)
    assert_refused(folder, match=r"up_proj")


@pytest.mark.parametrize(("change", "words"), [("drop", "lacks the weights"), ("add", "no place for")])
def test_weights_that_are_missing_or_too_many(folder: Path, change: str, words: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if change == "drop":
        del weights["model.layers.1.mlp.up_proj.weight"]
    else:
        weights["model.layers.1.mlp.side_proj.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    signed_again(folder)
    assert_refused(folder, match=words)


def test_an_altered_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    signed_again(folder)
    assert_refused(folder, match="mlp")


def changed(path: Path) -> None:
    """One digit differs; the length stays, and JSON stays JSON."""
    data = bytearray(path.read_bytes())
    data[max(data.rfind(digit) for digit in b"0123456789")] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_found_by_its_checksum(folder: Path, name: str) -> None:
    changed(folder / name)
    assert_refused(folder, match=rf"{name}.*altered")


def test_without_verification_sizes_alone_are_compared(folder: Path) -> None:
    changed(folder / "model.safetensors")
    assert load_pruned(folder, verify=False).lm_head.out_features == 64
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert_refused(folder, match="damaged", verify=False)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "pruner_lib.checkpoint", "files": {"../x": {}}}'])
def test_a_record_that_is_none(folder: Path, text: str) -> None:
    (folder / "provenance.json").write_text(text)
    assert_refused(folder, match=r"provenance\.json is damaged")


def test_the_card_may_be_edited_and_files_added(folder: Path) -> None:
    (folder / "README.md").write_text("my own words")
    (folder / "notes.txt").write_text("more")
    assert load_pruned(folder).config.intermediate_size == 44


SCORES = ImportanceScores.from_dict(
    {"layers.0.mlp_neuron": torch.ones(48)}, criterion="taylor_first", reduction="sum", source="books train",
    num_samples=10, seq_len=64, seed=3,
)  # fmt: skip


def test_everything_that_is_known_of_the_making_is_recorded(tmp_path: Path) -> None:
    model = tiny()
    dependencies = discover(model)
    plan = PruningPlan.from_removal(dependencies, UNEVEN)
    report = evaluate({"dense": model, "pruned": prune(model, plan)}, None, cost_at=(1, 8))
    place = save_pruned(
        prune(model, plan), tmp_path / "saved", plan=plan, scores=SCORES, quality=report,
        provenance={"base_model": "somebody/tiny", "license": "Apache-2.0", "recovery": "none"},
    )  # fmt: skip
    read = PruningPlan.load(place / "pruning_plan.json", dependencies)
    assert dict(read.removal) == dict(plan.removal)
    record = json.loads((place / "provenance.json").read_text())
    assert record["parameters"] == plan.params_after and record["dense_parameters"] == plan.params_before
    assert record["importance"] == {
        "criterion": "taylor_first", "reduction": "sum", "seed": 3,
        "calibration": {"source": "books train", "num_samples": 10, "seq_len": 64},
    }  # fmt: skip
    assert (record["base_model"], record["license"]) == ("somebody/tiny", "Apache-2.0")
    assert record["provenance"]["recovery"] == "none"
    assert record["library_version"] and record["opens_with"].startswith("import pruner_lib")
    assert (place / "evaluation.json").is_file()
    listed, there = set(record["files"]), {path.name for path in place.iterdir()}
    assert there - listed == {"provenance.json"}


def test_the_model_card_says_size_widths_quality_and_how_to_load(tmp_path: Path) -> None:
    model = tiny()
    plan = PruningPlan.from_removal(discover(model), UNEVEN)
    place = save_pruned(
        prune(model, plan), tmp_path / "saved", plan=plan, scores=SCORES,
        quality={"perplexity, my text": 12.5},
        provenance={"base_model": "somebody/tiny", "license": "Apache-2.0"},
    )  # fmt: skip
    card = (place / "README.md").read_text()
    front, title = card.split("---\n")[1], card.split("---\n", 2)[2]
    assert 'license: "apache-2.0"' in front and 'base_model: "somebody/tiny"' in front
    assert title.lstrip().startswith(f"# tiny, pruned to {plan.params_after / 1e3:.3g}k parameters")
    assert f"| parameters | {plan.params_before:,} | {plan.params_after:,} |" in card
    assert plan.summary() in card
    assert "| perplexity, my text | 12.5 |" in card
    assert "import pruner_lib" in card and "| vLLM | no |" in card
    assert "books train, 10 × 64 tokens" in card and "whose licence, Apache-2.0, applies" in card


def test_a_card_without_plan_quality_or_base_makes_no_claims(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Not measured" in card and "licence applies to them and was not recorded" in card
    assert "base_model" not in card and "import pruner_lib" not in card


def test_base_and_licence_are_handed_on_when_a_checkpoint_is_pruned_again(tmp_path: Path) -> None:
    first = {"base_model": "somebody/tiny", "license": "mit"}
    save_pruned(pruned(UNIFORM), tmp_path / "once", provenance=first)
    model = load_pruned(tmp_path / "once")
    again = prune(model, PruningPlan.from_removal(discover(model), {"layers.0.mlp_neuron": [0]}))
    save_pruned(again, tmp_path / "twice")
    record = json.loads((tmp_path / "twice" / "provenance.json").read_text())
    assert (record["base_model"], record["license"]) == ("somebody/tiny", "mit")


def test_the_licence_is_read_off_the_card_of_the_base_model(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\n---\n# Base\n")
    from transformers import AutoModelForCausalLM

    save_pruned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "provenance.json").read_text())
    assert (record["base_model"], record["license"]) == ("base", "llama3.2")


def test_compatibility_of_a_model_with_one_width() -> None:
    table = compatibility(pruned(UNIFORM))
    verdicts = {answer.program: answer.verdict for answer in table.answers}
    assert verdicts["transformers"] == verdicts["llama.cpp"] == verdicts["vLLM"] == "yes"
    assert table["llama.cpp q4_0, q5_0, q8_0"].verdict == "partly"
    assert "MLP neurons 44" in table["llama.cpp q4_0, q5_0, q8_0"].why
    assert "llama architecture" in table["llama.cpp"].why and "yes" in str(table)
    with pytest.raises(KeyError, match="known are transformers"):
        table["ollama"]


def test_compatibility_of_layers_that_differ_and_of_other_architectures() -> None:
    table = compatibility(pruned(UNEVEN))
    assert not table["transformers"].opens and "differ in width" in table["transformers"].why
    assert table["transformers with pruner_lib"].opens and "deci" in table["llama.cpp"].why
    assert not table["vLLM"].opens
    other = compatibility(tiny("gpt2"))
    assert other["transformers"].opens and not other["llama.cpp"].opens
    assert "no mapping" in other["llama.cpp"].why and other["vLLM"].verdict == "untested"


def test_compatibility_needs_no_weights() -> None:
    from pruner_lib.pruning.slicing import meta_copy

    assert compatibility(meta_copy(tiny()))["transformers"].opens
