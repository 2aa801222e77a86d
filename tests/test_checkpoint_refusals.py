"""Why a model cannot be saved or opened, each reason in its own words; links, and several dtypes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from test_checkpoint import UNEVEN, UNIFORM, logits, pruned, tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from pruner_lib.checkpoint import CheckpointError, compatibility, load_pruned, save_pruned


@pytest.mark.parametrize("target", [".", "..", "../..", "sub/.."])
def test_the_current_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    here = tmp_path / "saved" / "work"
    (here / "sub").mkdir(parents=True)
    save_pruned(pruned(UNIFORM), tmp_path / "elsewhere")
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "saved" / "provenance.json").write_text("{}")
    (here / "provenance.json").write_text("{}")
    monkeypatch.chdir(here)
    with pytest.raises(CheckpointError, match=r"(is|holds) the current directory.*folder inside it"):
        save_pruned(pruned(UNIFORM), target)
    assert Path.cwd() == here and (here / "sub").is_dir()
    save_pruned(pruned(UNIFORM), "inside")
    monkeypatch.chdir("inside")
    load_pruned(".")


def test_a_link_still_leads_to_the_checkpoint(tmp_path: Path) -> None:
    save_pruned(pruned(UNEVEN), tmp_path / "disk" / "first")
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "first", target_is_directory=True)
    model = pruned(UNIFORM)
    save_pruned(model, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    for name in ("latest", "disk/first"):
        assert torch.equal(logits(load_pruned(tmp_path / name)), logits(model))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["first"]


def test_an_attached_adapter_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = pruned(UNIFORM)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"adapter is attached \(in 3 layers.*q_proj\).*merge_adapter"):
        save_pruned(model, tmp_path / "saved")
    assert "adapter" in compatibility(model)["transformers"].why


def test_an_untied_head_is_named(tmp_path: Path) -> None:
    model = pruned(UNIFORM, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=True, but the output head"):
        save_pruned(model, tmp_path / "saved")
    model.config.tie_word_embeddings = False
    save_pruned(model, tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))


def test_what_json_cannot_say_is_named(tmp_path: Path) -> None:
    model = pruned(UNIFORM)
    model.config.note = {"made": object()}
    model.config.where = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"JSON cannot say: .*note \(dict\).*where \(device\)"):
        save_pruned(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


class OwnConfig(LlamaConfig):
    model_type = "nobody_knows_this_llama"


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig


def own() -> OwnLlama:
    sizes = {key: value for key, value in tiny().config.to_dict().items() if key != "model_type"}
    return OwnLlama(OwnConfig(**sizes)).eval()


def test_a_type_that_auto_classes_do_not_know_is_said_to_be_unknown(tmp_path: Path) -> None:
    model, message = own(), "'nobody_knows_this_llama' is not registered with AutoModelForCausalLM"
    answers = compatibility(model)
    for program in ("transformers", "transformers with pruner_lib", "vLLM"):
        assert not answers[program].opens and message in answers[program].why
    save_pruned(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"{message}.*OwnLlama.*register"):
        load_pruned(tmp_path / "saved")
    assert torch.equal(logits(OwnLlama.from_pretrained(tmp_path / "saved")), logits(model))
    AutoConfig.register(OwnConfig.model_type, OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnLlama)
    try:
        assert compatibility(model)["transformers"].opens
        assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))
    finally:
        del CONFIG_MAPPING._extra_content[OwnConfig.model_type]
        del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[OwnConfig]


def mixed(tied: bool) -> LlamaForCausalLM:
    """bfloat16, with a norm and a float32 head that are more exact."""
    model = pruned(UNIFORM, tie_word_embeddings=tied).bfloat16()
    torch.manual_seed(1)
    parts = [model.model.layers[1].input_layernorm, *([] if tied else [model.lm_head])]
    for part in parts:
        part.float()
        part.weight.data += 1e-4 * torch.randn_like(part.weight)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_comes_back_in_its_own_dtype(tmp_path: Path, tied: bool) -> None:
    model = mixed(tied)
    with pytest.warns(UserWarning, match=r"several dtypes: .* are not bfloat16 .*plain from_pretrained"):
        save_pruned(model, tmp_path / "saved")
    opened = load_pruned(tmp_path / "saved")
    before, after = model.state_dict(), opened.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {n: v.dtype for n, v in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_dtype_is_saved_without_a_warning(tmp_path: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_pruned(pruned(UNIFORM).to(dtype), tmp_path / "saved")
    assert {parameter.dtype for parameter in load_pruned(tmp_path / "saved").parameters()} == {dtype}
