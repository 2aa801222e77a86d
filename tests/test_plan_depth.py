"""Depth: a model without some layers is the model that skips them, and an ordinary, shorter one."""

import copy

import numpy as np
import pytest
import torch
from test_surgery import ARCHITECTURES, generated, logits, tiny, tokens
from transformers import AutoModelForCausalLM

from pruner_lib.checkpoint import save_pruned
from pruner_lib.discovery import discover
from pruner_lib.discovery.units import depth_units
from pruner_lib.evaluation import count_cost
from pruner_lib.importance import score_layers
from pruner_lib.importance.skipping import skipped
from pruner_lib.pruning import (
    PruningError,
    PruningPlan,
    drop_greedily,
    plan_layers,
    plan_pruning,
    prune,
    prune_layers,
)
from pruner_lib.pruning.layer_config import is_marked

BATCHES = torch.randint(3, 64, (4, 11), generator=torch.Generator().manual_seed(5))


def skipping(model, dependencies, dropped):
    """Logits of the dense model with those units skipped by hooks."""
    units = depth_units(dependencies)
    layers = [units[u] for u in dropped if u.count(".") == 1]
    with skipped(model, layers, [units[u] for u in dropped if u.count(".") > 1]):
        return logits(model)


DROPS = [
    ["layers.1"],
    ["layers.0", "layers.2"],
    ["layers.0.attention", "layers.2.mlp"],
    ["layers.2", "layers.1.mlp"],
]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "bloom"])
def test_dropped_equals_skipped(name, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4})
    model = tiny(name)
    dependencies = discover(model)
    for dropped in DROPS:
        dropped = [unit for unit in dropped if unit in depth_units(dependencies)]
        plan = PruningPlan.from_removal(dependencies, {}, dropped=dropped)
        shorter = prune(model, plan)
        expected = skipping(model, dependencies, dropped)
        torch.testing.assert_close(logits(shorter), expected, rtol=0, atol=1e-9)
        assert (expected - logits(model)).abs().max() > 1e-3, "the dropped units did not matter"
        assert vars(plan.cost()) == vars(count_cost(shorter)) and plan.cost().params == plan.params_after
        assert torch.equal(generated(shorter, use_cache=True), generated(shorter, use_cache=False))


def test_sublayers_of_every_architecture():
    assert set(depth_units(discover(tiny("llama")))) == {
        f"layers.{i}{unit}" for i in range(3) for unit in ("", ".attention", ".mlp")
    }
    assert not any(unit.endswith(".mlp") for unit in depth_units(discover(tiny("opt"))))  # bare matrices
    assert depth_units(discover(tiny("gpt2")))["layers.1.attention"] == "transformer.h.1.attn"


def test_a_shorter_model_is_an_ordinary_one(tmp_path):
    model = tiny("gemma2", num_hidden_layers=4)
    shorter = prune_layers(model, [0])
    assert shorter.config.num_hidden_layers == 3 and len(shorter.model.layers) == 3
    assert shorter.config.layer_types == model.config.layer_types[1:]
    assert [layer.self_attn.layer_idx for layer in shorter.model.layers] == [0, 1, 2]
    expected = generated(shorter, use_cache=False)
    assert torch.equal(generated(shorter, cache_implementation="static", disable_compile=True), expected)
    save_pruned(shorter, tmp_path / "short")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short", dtype=torch.float64)
    assert not is_marked(again.config)
    torch.testing.assert_close(logits(again), logits(shorter), rtol=0, atol=1e-5)  # rotary tables in float32


def test_depth_and_width_together():
    model = tiny("llama")
    dependencies = discover(model)
    removal = {"layers.0.mlp_neuron": [1, 2], "layers.2.attention_head": [0], "layers.1.mlp_neuron": [3]}
    plan = PruningPlan.from_removal(dependencies, removal, dropped=["layers.1"])
    assert set(plan.removal) == {"layers.0.mlp_neuron", "layers.2.attention_head"}
    pruned = prune(model, plan)
    zeroed = dependencies.zero(model, plan.removal)
    with skipped(zeroed, ["model.layers.1"]):
        expected = logits(zeroed)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-9)
    assert [layer.intermediate_size for layer in pruned.config.per_layer_config] == [46, 48]
    assert vars(plan.cost()) == vars(count_cost(pruned))


def test_layers_left_with_one_width_need_no_per_layer_configuration(tmp_path):
    """Only layer 1 differs, and it goes: what is left opens without this library."""
    model = tiny("llama")
    uneven = prune(model, PruningPlan.from_removal(discover(model), {"layers.1.mlp_neuron": [0, 1]}))
    assert uneven.config.is_heterogeneous and is_marked(uneven.config)
    shorter = prune_layers(uneven, [1])
    assert not shorter.config.is_heterogeneous and not is_marked(shorter.config)
    narrow = prune_layers(uneven, [0, 2])
    assert narrow.config.intermediate_size == 46 and not is_marked(narrow.config)
    save_pruned(narrow, tmp_path / "narrow")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float64)
    torch.testing.assert_close(logits(again), logits(narrow), rtol=0, atol=1e-5)


def test_a_shorter_model_trains_and_is_pruned_again():
    model = tiny("llama")
    shorter = prune_layers(model, ["layers.1", "layers.2.attention"])
    shorter(tokens(), labels=tokens()).loss.backward()
    unused = {name for name, p in shorter.named_parameters() if p.grad is None}
    assert unused == {"model.layers.1.input_layernorm.weight"}, "the norm before a dropped attention is idle"
    dependencies = discover(shorter)
    assert {f.name for f in dependencies.select(kind="attention_head")} == {"layers.0.attention_head"}
    cut = prune(shorter, PruningPlan.from_removal(dependencies, {"layers.1.mlp_neuron": [4]}))
    expected = logits(dependencies.zero(shorter, {"layers.1.mlp_neuron": [4]}))
    torch.testing.assert_close(logits(cut), expected, rtol=0, atol=1e-9)


def test_the_given_model_is_untouched():
    model = tiny("llama").train()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    shorter = prune_layers(model, count=1, batches=BATCHES)
    drop_greedily(model, discover(model), BATCHES, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and model.training and shorter.training
    assert not any(module._forward_hooks for module in model.modules())
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in shorter.state_dict().values()}


def test_meta_models_lose_layers_without_weights():
    model = tiny("llama").to("meta")
    shorter = prune_layers(model, [0, 1])
    assert shorter.config.num_hidden_layers == 1 and all(p.is_meta for p in shorter.parameters())


def test_block_influence_by_hand():
    model = tiny("llama")
    dependencies = discover(model)
    scores = score_layers(model, dependencies, BATCHES, unit=("block", "attention"), micro_batch_size=3)
    with torch.no_grad():
        states = model(BATCHES, output_hidden_states=True).hidden_states[:3]
        inner = model.model.layers[1]
        middle = inner(
            states[1], position_embeddings=model.model.rotary_emb(states[1], torch.arange(11)[None])
        )
        normed = inner.post_attention_layernorm(states[1])
        without = states[1] + inner.mlp(normed)
    cosine = torch.nn.functional.cosine_similarity
    for layer in (0, 1):
        expected = 1 - cosine(states[layer], states[layer + 1], dim=-1).mean()
        assert scores[f"layers.{layer}"].item() == pytest.approx(expected.item(), abs=1e-12)
    expected = 1 - cosine(without, middle, dim=-1).mean()
    assert scores["layers.1.attention"].item() == pytest.approx(expected.item(), abs=1e-12)


@torch.no_grad()
def loss(model):
    predicted = model(BATCHES).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predicted, BATCHES[:, 1:].flatten()).item()


def test_loss_and_greedy_against_cutting():
    model = tiny("llama", num_hidden_layers=4)
    dependencies = discover(model)
    scores = score_layers(model, dependencies, BATCHES, measure="loss")
    alone = {unit: loss(prune_layers(model, [unit], dependencies=dependencies)) for unit in scores}
    for unit, value in alone.items():
        assert scores[unit].item() == pytest.approx(value - loss(model), abs=1e-9)
    first, second = drop_greedily(model, dependencies, BATCHES, 2)
    assert first.unit == min(alone, key=alone.get) and first.loss == pytest.approx(min(alone.values()))
    pairs = {
        unit: loss(prune_layers(model, [first.unit, unit], dependencies=dependencies))
        for unit in alone
        if unit != first.unit
    }
    assert second.unit == min(pairs, key=pairs.get) and second.loss == pytest.approx(min(pairs.values()))
    plan = plan_layers(model, count=2, batches=BATCHES, method="greedy", dependencies=dependencies)
    assert set(plan.dropped) == {first.unit, second.unit}


@pytest.mark.parametrize("method", ["greedy", "loss", "influence"])
def test_about_2048_tokens_run_at_once(method):
    model, seen = tiny("llama"), []

    def watch(module, args, given):
        seen.append(given["input_ids"].shape[0])

    model.register_forward_pre_hook(watch, with_kwargs=True)
    long = torch.randint(3, 64, (40, 64), generator=torch.Generator().manual_seed(5))
    options = {"count": 1, "batches": long, "method": method, "dependencies": discover(model)}
    dropped = set()
    for size, expected in ((None, {32, 8}), (20, {20}), (40, {40})):
        seen.clear()
        dropped.add(plan_layers(model, **options, micro_batch_size=size).dropped)
        assert set(seen) == expected
    assert len(dropped) == 1
    with pytest.raises(ValueError, match="micro_batch_size"):
        prune_layers(model, **options, micro_batch_size=0)


def test_running_out_of_memory_is_answered_with_advice(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("pruner_lib.pruning.depth.loss_without", full)
    with pytest.raises(MemoryError, match="lower micro_batch_size"):
        prune_layers(tiny("llama"), count=1, batches=BATCHES, method="greedy")


@pytest.mark.parametrize(
    "one",
    [1, np.int64(1), np.arange(1, 2), torch.tensor(1), torch.tensor([1]), [torch.tensor(1)], range(1, 2)],
)
def test_layers_may_be_numbers_of_numpy_and_torch(one):
    model = tiny("llama")
    dependencies = discover(model)
    assert plan_layers(model, one, dependencies=dependencies).dropped == ("layers.1",)
    assert prune_layers(model, one).config.num_hidden_layers == 2
    families = dependencies.select(kind="mlp_neuron", layers=one)
    assert [family.name for family in families] == ["layers.1.mlp_neuron"]
    planned = plan_pruning(
        dependencies, {"layers.1.mlp_neuron": torch.arange(48)}, ratio=0.5, kinds="mlp_neuron", layers=one
    )
    assert set(planned.removal) == {"layers.1.mlp_neuron"}


@pytest.mark.parametrize("mask", [[False, True, False], np.array([False, True, False]),
                                  torch.tensor([False, True, False]), [1.0], [None]])  # fmt: skip
def test_a_mask_or_a_fraction_is_no_number_of_a_layer(mask):
    model = tiny("llama")
    dependencies = discover(model)
    with pytest.raises(ValueError, match="drop takes numbers of layers and names of units, such as"):
        plan_layers(model, mask, dependencies=dependencies)
    with pytest.raises(TypeError, match="layers are whole numbers, such as 5"):
        dependencies.select(layers=mask)
    with pytest.raises(ValueError, match="layers are numbers of layers"):
        plan_pruning(dependencies, {}, ratio=0.5, layers=mask)


def test_layers_planned_by_score():
    model = tiny("llama")
    dependencies = discover(model)
    scores = score_layers(model, dependencies, BATCHES)
    lowest = min(scores, key=lambda unit: scores[unit].item())
    plan = plan_pruning(dependencies, scores, ratio=1 / 3, kinds="block")
    assert plan.dropped == (lowest,) == plan_layers(model, count=1, batches=BATCHES).dropped
    assert f"dropped whole: layer {lowest.removeprefix('layers.')}" in str(plan)


def test_plans_with_layers_are_saved_and_loaded(tmp_path):
    dependencies = discover(tiny("llama"))
    plan = PruningPlan.from_removal(
        dependencies, {"layers.0.mlp_neuron": [2]}, dropped=["layers.1", "layers.2.mlp"]
    )
    again = PruningPlan.load(plan.save(tmp_path / "plan.json"), dependencies)
    assert again.dropped == plan.dropped == ("layers.1", "layers.2.mlp")
    assert again.params_after == plan.params_after and dict(again.removal) == dict(plan.removal)


def test_layers_that_mean_something_by_their_number_are_refused():
    """GPT-2 may divide its attention by the layer's number; another number computes something else."""
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PruningError, match=r"no way to say which layers stay|differs from one that skips"):
        prune_layers(model, [0])
    assert prune_layers(model, [2]).config.n_layer == 2, "the last one can go"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either drop, the layers that go, or count"),
        ({"drop": [0], "count": 1}, "not both"),
        ({"drop": True}, "not True"),
        ({"drop": 1.0}, "not 1.0"),
        ({"drop": [3]}, r"no unit of depth 'layers.3' in this model of 3 layers"),
        ({"drop": ["layers.0.norm"]}, "no unit of depth 'layers.0.norm'"),
        ({"drop": [0, 1, 2]}, "all 3 layers would go; at least one must stay"),
        ({"count": 1}, "give batches"),
        ({"count": 3, "batches": BATCHES}, "count 3: the model has 3 such units"),
        ({"count": 0, "batches": BATCHES, "method": "greedy"}, "give 1 to 2"),
        (
            {"count": 1, "batches": BATCHES, "method": "random"},
            "unknown method 'random'; valid are influence",
        ),
        ({"drop": [0], "method": "random"}, "unknown method 'random'"),
        ({"count": 2.0, "batches": BATCHES}, "count 2.0: the model has 3 such units"),
        ({"count": 1, "batches": BATCHES, "unit": "head"}, "unknown unit 'head'; valid are block"),
        ({"count": 1, "batches": BATCHES + 1000}, "outside the model's vocabulary"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        prune_layers(tiny("llama"), **options)


def test_a_unit_that_the_model_has_not_is_refused():
    model = tiny("opt")
    with pytest.raises(ValueError, match="kind 'mlp': this model has no such unit"):
        plan_pruning(discover(model), {}, ratio=0.5, kinds="mlp")


@pytest.mark.parametrize("method", ["influence", "loss", "greedy"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_as_many_units_go_as_asked_for(method, count):
    """A sublayer of a layer that goes, too, is none more."""
    units = ("block", "attention", "mlp")
    plan = plan_layers(tiny("llama"), count=count, unit=units, batches=BATCHES, method=method)
    assert len(plan.dropped) == count


def test_more_units_than_can_go_apart():
    with pytest.raises(ValueError, match=r"only \d units can go"):
        plan_layers(tiny("llama"), count=8, unit=("block", "attention", "mlp"), batches=BATCHES)


def test_what_is_left_stays_in_evaluation():
    shorter = prune_layers(tiny("llama").eval(), ["layers.0", "layers.1.mlp"])
    assert not any(module.training for module in shorter.modules())


@pytest.mark.parametrize("unit", ["layers.1", "layers.2"])
def test_a_plan_is_not_carried_out_twice(unit):
    """A shorter model has other layers under the same names."""
    model = tiny("llama")
    shorter = prune_layers(model, unit)
    with pytest.raises(PruningError, match=r"another model: it expects model\.layers\.2\."):
        prune(shorter, PruningPlan.from_removal(discover(model), {}, dropped=[unit]))
    with pytest.raises(PruningError, match=r"another model: it expects model\.layers\.2\."):
        prune(shorter, PruningPlan.from_removal(discover(model), {"layers.0.mlp_neuron": [1]}))
