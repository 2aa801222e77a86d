"""Adapters that are not recover's own: other names, several, merged in place, shared layers, other kinds."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from recovery_models import QUICK, counting, same, snapshot, tiny_llama

from pruner_lib.recovery import RecoveryError, RecoverySettings, merge_adapter, recover

ENDS = ["q_proj", "down_proj"]


def lora(**changes):
    return LoraConfig(r=3, lora_alpha=12, target_modules=ENDS, task_type=TaskType.CAUSAL_LM, **changes)


def randomised(adapted, seed=1):
    """Every trained number drawn anew, so that no B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def adapted_model(model=None, name="default", **changes):
    return randomised(get_peft_model(model or tiny_llama(), lora(**changes), adapter_name=name))


@torch.no_grad()
def logits(model):
    return model(counting()).logits


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_any_name_is_merged(name):
    adapted = adapted_model(name=name)
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(tiny_llama()))
    torch.testing.assert_close(logits(merge_adapter(adapted)), expected)


def test_the_active_adapters_are_merged_and_no_others():
    adapted = adapted_model()
    adapted.add_adapter("second", lora())
    randomised(adapted, seed=2)
    adapted.set_adapter("second")
    one = copy.deepcopy(adapted)
    torch.testing.assert_close(logits(merge_adapter(one)), logits(adapted))
    adapted.base_model.set_adapter(["default", "second"])
    expected = logits(adapted)
    torch.testing.assert_close(logits(merge_adapter(adapted)), expected)


def test_an_adapter_that_peft_merged_in_place_is_not_added_again():
    adapted = adapted_model()
    expected = logits(adapted)
    adapted.merge_adapter()
    written = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    merged = merge_adapter(adapted)
    torch.testing.assert_close(logits(merged), expected)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "has DoRA"),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "has a trained copy of a whole module"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(changes, message):
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    adapted = adapted_model(model, **changes)
    expected = logits(adapted)
    with pytest.raises(RecoveryError, match=rf"{message}.*merge_and_unload"):
        merge_adapter(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected)


def test_other_kinds_of_adapter_are_refused():
    from peft import LoHaConfig

    adapted = get_peft_model(tiny_llama(), LoHaConfig(r=2, target_modules=ENDS))
    with pytest.raises(RecoveryError, match=r"loha.*merge_and_unload"):
        merge_adapter(adapted)
    with pytest.raises(RecoveryError, match=r"takes PEFT's model.*not a LlamaForCausalLM"):
        merge_adapter(tiny_llama())


def shared_model():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    return model


def test_a_layer_with_two_parents_is_refused():
    """The adapter would act at one place and be merged into both."""
    both = r"layers\.0\.mlp\.down_proj and model\.layers\.1\.mlp\.down_proj share one weight"
    with pytest.raises(RecoveryError, match=both):
        recover(shared_model(), None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    with pytest.raises(RecoveryError, match=r"layers\.0\.mlp\.down_proj.* share one weight"):
        merge_adapter(adapted_model(shared_model()))
    alike = tiny_llama()
    alike.model.layers[1].mlp.down_proj.weight = alike.model.layers[0].mlp.down_proj.weight
    with pytest.raises(RecoveryError, match=both):
        recover(alike, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    others = RecoverySettings(**QUICK, target=("q_proj",))
    model = shared_model()
    before = snapshot(model)
    result = recover(model, None, counting(), settings=others, progress=False)
    assert result.losses[-1] < result.losses[0]
    assert same(snapshot(model), before)


def test_a_whole_layer_that_stands_twice_is_adapted_and_merged_at_both_places():
    model = tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    adapted = adapted_model(model)
    expected = logits(adapted)
    merged = merge_adapter(adapted)
    torch.testing.assert_close(logits(merged), expected)
    assert not any("lora" in name for name, _ in merged.named_parameters())
