"""The cut's self-check looks at one layer of each sort, and misses no layer that is not right."""

import copy

import pytest
import torch
from test_surgery import tiny

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, prune, verification
from pruner_lib.pruning.alike import by_layer, stand_ins
from pruner_lib.pruning.slicing import meta_copy
from pruner_lib.pruning.verification import find_difference

SIX = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}


def cut_plan(model, layers=range(6)):
    removal = {f"layers.{i}.attention_head": [1] for i in layers}
    removal |= {f"layers.{i}.mlp_neuron": [0, 5] for i in layers}
    return PruningPlan.from_removal(discover(model), removal)


@pytest.fixture(scope="module")
def cut():
    model = meta_copy(tiny("llama", **SIX))
    plan = cut_plan(model)
    return prune(model, plan), plan


def seen_layers(monkeypatch, model, plan):
    """How many layers discovery was run over, one number per run."""
    runs = []

    def counting(model, **options):
        found = discover(model, **options)
        runs.append(found.num_layers)
        return found

    monkeypatch.setattr("pruner_lib.discovery.discover", counting)
    assert find_difference(model, plan) is None
    return runs


def test_equal_layers_are_looked_at_once(cut, monkeypatch):
    assert seen_layers(monkeypatch, *cut) == [2], "the first and the last of one sort"


def test_a_range_of_layers_makes_two_sorts(monkeypatch):
    model = meta_copy(tiny("llama", **SIX))
    plan = cut_plan(model, range(1, 5))
    assert seen_layers(monkeypatch, prune(model, plan), plan) == [4]


def test_layers_of_every_width_are_all_looked_at(monkeypatch):
    model = meta_copy(tiny("llama", **SIX))
    removal = {f"layers.{i}.mlp_neuron": list(range(i)) for i in range(6)}
    plan = PruningPlan.from_removal(discover(model), removal)
    assert seen_layers(monkeypatch, prune(model, plan), plan) == [6]


def test_sliding_and_full_layers_are_two_sorts():
    model = meta_copy(tiny("gemma2", num_hidden_layers=6))
    assert stand_ins(model, {}).kept == (0, 1, 4, 5)


def scaled(layer):
    layer.mlp.act_fn = Scaled()


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * 0.3


@pytest.mark.parametrize(
    "breaking",
    [
        lambda layer: setattr(layer.self_attn, "num_key_value_groups", 1),
        lambda layer: setattr(layer.self_attn, "head_dim", 8),
        lambda layer: setattr(layer.mlp, "up_proj", layer.mlp.gate_proj),
        scaled,
    ],
)
def test_one_wrong_layer_in_the_middle_is_found(cut, breaking):
    model, plan = copy.deepcopy(cut[0]), cut[1]
    assert stand_ins(model, {}).kept == (0, 5)
    breaking(model.model.layers[2])
    assert stand_ins(model, {}).kept == (0, 2, 5)
    assert find_difference(model, plan) is not None


def test_what_the_dense_model_tells_apart_is_looked_at_apart(cut):
    """Facts of discovery that differ in one layer keep that layer, though its code looks the same."""
    model, plan = cut
    facts = by_layer(model, [*verification._facts(plan, {}), ("model.layers.3.mlp", "a number")])
    assert stand_ins(model, facts).kept == (0, 3, 5)


def test_the_short_model_is_a_model_and_the_long_one_stays(cut):
    model, _ = cut
    before = copy.deepcopy(model.config.to_dict())
    short = stand_ins(model, {})
    assert short.renamed("model.layers.5.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert short.renamed("model.layers.4.mlp") is None and short.renamed("lm_head.weight") == "lm_head.weight"
    assert [layer.self_attn.layer_idx for layer in short.model.model.layers] == [0, 1]
    assert short.model.config.num_hidden_layers == 2
    assert model.config.to_dict() == before and len(model.model.layers) == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))


def test_a_model_that_cannot_be_shortened_is_looked_at_whole(cut, monkeypatch):
    def refuse(model, layers):
        raise AttributeError("no such entry")

    monkeypatch.setattr("pruner_lib.pruning.alike.remove_layers", refuse)
    assert seen_layers(monkeypatch, *cut) == [6]


def test_a_plain_module_has_no_layers_to_leave_out():
    assert stand_ins(torch.nn.Sequential(torch.nn.Linear(4, 4)), {}) is None


def held_while(make):
    """What a call returns, and the most bytes of tensors that it held at once."""
    from pruner_lib.evaluation.memory import _allocated_by

    made = []
    return _allocated_by(lambda: made.append(make()), torch.device("cpu")), made[0]


@pytest.mark.parametrize("dropped", [[], ["layers.0", "layers.3", "layers.4", "layers.5.mlp"]])
@pytest.mark.parametrize("channels", [[], [0, 3]], ids=["neurons", "neurons and width"])
def test_beside_the_given_model_a_cut_holds_the_new_one_and_a_matrix(dropped, channels):
    model = tiny("llama", **SIX, hidden_size=64, intermediate_size=1024)
    dependencies = discover(model)
    removal = {f"layers.{i}.mlp_neuron": range(0, 1024, 4) for i in range(6)}
    removal["hidden_channel"] = channels
    plan = PruningPlan.from_removal(dependencies, removal, dropped=dropped)
    peak, cut = held_while(lambda: prune(model, plan))
    size = sum(p.numel() * p.element_size() for p in cut.parameters())
    matrix = 64 * 1024 * 8
    assert size <= peak < size + 2 * matrix, (peak, size)
    given = {p.data_ptr() for p in model.parameters()}
    assert not given & {p.data_ptr() for p in cut.parameters()}


def test_kinds_that_are_cut_in_turn_hold_no_model_between():
    """Heads and neurons of Phi-3 go one after the other, but only the last model has weights."""
    model = tiny("phi3", **SIX, hidden_size=64, intermediate_size=1024)
    dependencies = discover(model)
    removal = {f"layers.{i}.mlp_neuron": range(0, 1024, 4) for i in range(6)}
    removal |= {f"layers.{i}.attention_head": [0] for i in (1, 4)}
    plan = PruningPlan.from_removal(dependencies, removal)
    peak, cut = held_while(lambda: prune(model, plan))
    size = sum(p.numel() * p.element_size() for p in cut.parameters())
    assert size <= peak < size + 4 * 64 * 1024 * 8, (peak, size)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        zeroed = dependencies.zero(model, removal)(tokens).logits
        assert torch.allclose(cut(tokens).logits, zeroed, atol=1e-9)
