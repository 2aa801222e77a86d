"""Saved and opened again the logits are the same bit for bit; damage is an error, never a wrong model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
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


THREE_OF_FOUR = {f"layers.{i}.attention_head": [0] for i in range(3)}


def test_a_head_count_that_llama_s_configuration_forbids_is_saved_as_mistral(tmp_path: Path) -> None:
    model = pruned(THREE_OF_FOUR, num_key_value_heads=4)
    assert model.config.num_attention_heads == 3  # 32 is no multiple of 3
    save_pruned(model, tmp_path / "saved")
    opened = load_pruned(tmp_path / "saved")
    assert opened.config.model_type == "mistral" and model.config.model_type == "llama"
    assert torch.equal(logits(opened), logits(model))
    assert json.loads((tmp_path / "saved" / "provenance.json").read_text())["saved_as"] == "mistral"


def test_with_biases_mistral_cannot_stand_in_and_the_library_is_needed(tmp_path: Path) -> None:
    model = pruned(THREE_OF_FOUR, num_key_value_heads=4, attention_bias=True)
    save_pruned(model, tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))


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


def test_what_no_configuration_can_say_is_not_saved(tmp_path: Path) -> None:
    model = pruned({"layers.0.attention_head": [1]}, "gpt2")
    with pytest.raises(CheckpointError, match="no way to say the new sizes"):
        save_pruned(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_lacks_what_its_configuration_builds_is_not_saved(tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[1].mlp = torch.nn.Identity()  # plain from_pretrained would fill it with random weights
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp.* is no part of it"):
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


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = pruned(UNIFORM), pruned(UNEVEN)
    dependencies = discover(other)
    family = dependencies.select("mlp_neuron")[0]
    plan = PruningPlan.from_removal(dependencies, {family.name: [0]})
    with pytest.raises(CheckpointError, match=r"plan leaves .* parameters, the model has"):
        save_pruned(model, tmp_path / "saved", plan=plan)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("removal", [UNIFORM, UNEVEN], ids=["one width", "layers differ"])
def test_a_pruned_model_drafts_for_the_dense_one(tmp_path: Path, removal: dict[str, list[int]]) -> None:
    """Speculative decoding changes the speed, never the tokens."""
    model = tiny()
    save_pruned(pruned(removal), tmp_path / "draft")
    ids = torch.arange(3, 9).reshape(1, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    drafted = model.generate(ids, assistant_model=load_pruned(tmp_path / "draft"), **options)
    assert torch.equal(drafted, model.generate(ids, **options))
