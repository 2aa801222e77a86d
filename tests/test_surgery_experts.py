"""Experts cut to a width that torch's grouped product cannot run: one warning that says what helps."""

import warnings

import pytest
import torch
from test_planning import scores_for
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import CONFIGURATIONS, MORE

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, plan_pruning, prune

TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
WIDE = {"intermediate_size": 44, "moe_intermediate_size": 44, "shared_expert_intermediate_size": 44}


def mixture(name, dtype, **loading):
    """Experts of 44 neurons, run as transformers runs them by default if not told otherwise."""
    model_type, settings = {**CONFIGURATIONS, **MORE}[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**settings, **WIDE})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **loading).eval()


def without(model, kind, count):
    """The model without the first groups of every family of a kind, and what was warned of."""
    dependencies = discover(model)
    removal = {family.name: range(count) for family in dependencies.select(kind=kind)}
    return warned(model, PruningPlan.from_removal(dependencies, removal))


def warned(model, plan):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruned = prune(model, plan)
    return pruned, [str(item.message) for item in caught if "grouped matrix product" in str(item.message)]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_width_that_cannot_run_is_warned_of_with_what_helps(name, dtype, multiple):
    model = mixture(name, dtype)
    pruned, said = without(model, "mlp_neuron", 11)
    assert len(said) == 1, "one warning for all layers"
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        logits(pruned)
    assert "33" in said[0] and str(dtype).removeprefix("torch.") in said[0]
    assert f"round_to={{'mlp_neuron': {multiple}}}" in said[0]
    assert 'experts_implementation="eager"' in said[0]

    pruned.set_experts_implementation("eager")
    assert torch.isfinite(logits(pruned)).all(), "the second way out"
    dependencies = discover(model)
    plan = plan_pruning(
        dependencies,
        scores_for(dependencies),
        ratio=0.25,
        kinds="mlp_neuron",
        round_to={"mlp_neuron": multiple},
    )
    rounded, said = warned(model, plan)
    assert not said and torch.isfinite(logits(rounded)).all(), "the first way out"


@pytest.mark.parametrize(
    ("kind", "count", "runs"),
    [
        ("mlp_neuron", 4, True),
        ("mlp_neuron", 2, False),
        ("hidden_channel", 4, True),
        ("hidden_channel", 2, False),
        ("attention_head", 1, True),
        ("expert", 1, True),
    ],
)
def test_it_warns_exactly_where_the_forward_pass_raises(kind, count, runs):
    pruned, said = without(mixture("mixtral", torch.float32), kind, count)
    assert bool(said) is not runs
    if runs:
        assert torch.isfinite(logits(pruned)).all()
    else:
        assert f"{{'{kind}': 4}}" in said[0]
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            logits(pruned)


def test_experts_that_run_in_a_loop_are_not_warned_of():
    pruned, said = without(
        mixture("mixtral", torch.float32, experts_implementation="eager"), "mlp_neuron", 11
    )
    assert not said and torch.isfinite(logits(pruned)).all()


def test_a_model_without_experts_is_not_warned_of():
    config = AutoConfig.for_model("llama", **CONFIGURATIONS["llama"][1])
    assert not without(AutoModelForCausalLM.from_config(config), "mlp_neuron", 11)[1]


def test_experts_in_dropped_layers_are_not_warned_of():
    model = mixture("mixtral", torch.float32)
    dependencies = discover(model)
    removal = {"layers.0.mlp_neuron": range(11), "layers.1.mlp_neuron": range(4)}
    pruned, said = warned(model, PruningPlan.from_removal(dependencies, removal, dropped=["layers.0"]))
    assert not said and torch.isfinite(logits(pruned)).all()
