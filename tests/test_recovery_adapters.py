"""The adapter alone, and merging it: exact, once, and never into the weights it was made over."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from recovery_models import QUICK, counting, same, snapshot, tiny_gpt2, tiny_llama

from pruner_lib.recovery import (
    RecoveryError,
    RecoverySettings,
    attach_adapter,
    linear_modules,
    merge_adapter,
    recover,
)
from pruner_lib.recovery.adapters import attach_lora


def adapted_model(make=tiny_llama, dtype=torch.float32):
    model = make().to(dtype)
    adapted = attach_lora(model, RecoverySettings(rank=3, alpha=12)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_merged_weight_is_the_rounded_sum_exactly(make, dtype):
    """W' == round(W + (α / r) B A), the sum in float32 whatever W is held in."""
    model, adapted = adapted_model(make, dtype)
    expected = {}
    for name in linear_modules(model):
        layer = adapted.get_submodule(f"base_model.model.{name}")
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (12 / 3)
        update = update.T if make is tiny_gpt2 else update
        expected[name] = (model.get_submodule(name).weight.float() + update).to(dtype)
    merged = merge_adapter(adapted)
    for name, value in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, value), name


def test_merging_twice_is_merging_once():
    _, adapted = adapted_model()
    first = snapshot(merge_adapter(adapted))
    second = merge_adapter(adapted)
    assert same(snapshot(second), first)
    assert not any("lora" in name for name, _ in second.named_parameters())


def test_base_weights_are_bit_identical_until_and_after_the_merge():
    model = tiny_llama()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    adapted = attach_lora(model, RecoverySettings(**QUICK))
    seen = []

    def look(record):
        seen.append(same(snapshot(model), before))

    recover(model, None, counting(), settings=RecoverySettings(**QUICK), on_step=look, progress=False)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(counting(), labels=counting()).loss.backward()
    optimizer.step()
    inside = {name: value for name, value in snapshot(adapted.base_model.model).items() if "lora" not in name}
    assert same({name.replace(".base_layer", ""): value for name, value in inside.items()}, before)
    assert seen == [True] * 6
    assert same(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_training_copies_no_frozen_weight_and_the_result_shares_none():
    model = tiny_llama()
    places = {parameter.data_ptr() for parameter in model.parameters()}
    adapted = attach_lora(model, RecoverySettings())
    frozen = [p for name, p in adapted.named_parameters() if "lora" not in name]
    assert {parameter.data_ptr() for parameter in frozen} == places
    result = recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    assert places.isdisjoint({parameter.data_ptr() for parameter in result.model.parameters()})
    assert result.num_trainable == 8 * sum(
        sum(model.get_submodule(name).weight.shape) for name in linear_modules(model)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = tiny_llama()
    result = recover(
        model, None, counting(), settings=RecoverySettings(**QUICK), output_dir=folder, progress=False
    )
    return model, result


def test_a_saved_adapter_attached_later_and_merged_is_the_result(saved):
    model, result = saved
    before = snapshot(model)
    adapted = attach_adapter(model, result.adapter_path)
    assert isinstance(adapted, PeftModel)
    assert same(snapshot(merge_adapter(adapted)), snapshot(result.model))
    assert same(snapshot(model), before)
    narrow = merge_adapter(attach_adapter(tiny_llama().bfloat16(), result.adapter_path))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        narrow(counting()).logits.float(), result.model(counting()).logits, atol=0.3, rtol=0.1
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_llama(seed=4), "the weights do not"),
        (lambda: tiny_llama(intermediate_size=20), r"gate_proj was \[24, 16\] there, here it is \[20, 16\]"),
        (tiny_gpt2, "no such layer"),
    ],
)
def test_an_adapter_of_another_model_is_refused(saved, make, message):
    with pytest.raises(RecoveryError, match=message):
        attach_adapter(make(), saved[1].adapter_path)


def test_no_adapter_and_a_damaged_one_are_refused(saved, tmp_path):
    with pytest.raises(RecoveryError, match=r"adapter_config\.json is missing"):
        attach_adapter(tiny_llama(), tmp_path)
    copied = tmp_path / "adapter"
    shutil.copytree(saved[1].adapter_path, copied)
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(RecoveryError, match="does not fit"):
        attach_adapter(tiny_llama(), copied)
    with pytest.raises(RecoveryError, match="already carries an adapter"):
        attach_adapter(attach_adapter(tiny_llama(), saved[1].adapter_path), saved[1].adapter_path)


def test_the_adapter_folder_holds_no_pickle_and_no_base_weights(saved):
    names = {path.name for path in saved[1].adapter_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    noted = json.loads((saved[1].adapter_path / "base_model.json").read_text())
    assert set(noted) == set(linear_modules(saved[0]))
