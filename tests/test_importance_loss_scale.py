"""Scores in nats: what they say of a family's lowest groups is what zeroing these does to the loss."""

from __future__ import annotations

import pytest
import torch
from zoo import tiny

import pruner_lib as pl
from pruner_lib.importance import ImportanceScores, measure_importance, scale_to_loss
from pruner_lib.importance.calibration import mean_loss


@pytest.fixture(scope="module")
def case():
    model = tiny("llama")
    dependencies = pl.discover(model)
    families = dependencies.select(kind=("attention_head", "mlp_neuron"))
    batches = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    scores = pl.estimate_importance(model, dependencies, batches, criterion="l2", families=families)
    return model, dependencies, scores, batches


def cost_of(case, removal):
    """The loss change of zeroing some groups, or its standard error where that is larger."""
    model, dependencies, _, batches = case
    zeroed = dependencies.zero(model, removal)
    each = [mean_loss(zeroed, [row[None]]) - mean_loss(model, [row[None]]) for row in batches]
    change = torch.tensor(each, dtype=torch.float64)
    return max(float(change.mean()), float(change.std()) / len(batches) ** 0.5)


@pytest.mark.parametrize("growth", [1.0, 2.0])
def test_the_lowest_neurons_sum_to_their_loss_change(case, growth):
    model, dependencies, scores, batches = case
    found = scale_to_loss(model, dependencies, scores, batches, ratio=0.25, growth=growth)
    name = "layers.1.mlp_neuron"
    lowest = scores[name].argsort()[: round(0.25 * len(scores[name]))]
    assert float(found[name][lowest].sum()) == pytest.approx(cost_of(case, {name: lowest.tolist()}), rel=1e-6)
    assert torch.equal(found[name].argsort(), scores[name].argsort())
    assert "scaled to the loss" in found.criterion
    ratios = (found[name] / scores[name])[scores[name].argsort()]
    assert bool((ratios.diff() > 0).all()) if growth > 1 else torch.allclose(ratios, ratios[0])


def test_small_families_are_measured_group_by_group(case):
    model, dependencies, scores, batches = case
    name = "layers.0.attention_head"
    found = scale_to_loss(model, dependencies, scores, batches, families=[name])
    assert list(found) == [name]
    truth = measure_importance(model, dependencies, batches, name)[name]
    assert bool((found[name] >= truth - 1e-9).all())
    clear = truth > 0
    assert bool((found[name] > 0).all()) and torch.allclose(
        found[name][clear & (found[name] <= truth + 1e-9)], truth[clear & (found[name] <= truth + 1e-9)]
    )


def test_micro_batches_and_whole_passes_give_the_same(case, monkeypatch):
    model, dependencies, scores, batches = case
    whole = scale_to_loss(model, dependencies, scores, batches)
    pieces = scale_to_loss(model, dependencies, scores, batches, micro_batch_size=2)
    monkeypatch.setattr("pruner_lib.importance.loss_scale.layer_index", lambda model, family: None)
    slow = scale_to_loss(model, dependencies, scores, batches)
    for name in scores:
        assert torch.allclose(whole[name], pieces[name], rtol=1e-6)
        assert torch.allclose(whole[name], slow[name], rtol=1e-6)


def test_neurons_that_never_fire_leave_the_others_in_nats(case):
    model, dependencies, scores, batches = case
    name = "layers.0.mlp_neuron"
    size = dependencies.family(name).size
    half = torch.arange(size).clamp(min=size // 2) - size // 2  # half of them, and one, are zero
    scores = scores.scores | {name: half}
    found = scale_to_loss(model, dependencies, scores, batches, ratio=0.25)[name]
    positive = size - size // 2 - 1
    lowest = list(range(size - positive + round(0.25 * positive)))
    cost = cost_of(case, {name: lowest})
    assert cost > 0 and float(found[lowest].sum()) == pytest.approx(cost, rel=1e-6)
    assert torch.equal(found == 0, half == 0) and torch.equal(found.argsort(), half.argsort())
    nothing = scale_to_loss(model, dependencies, {name: torch.zeros(size)}, batches)[name]
    assert torch.equal(nothing, torch.zeros(size, dtype=torch.float64))


def test_scores_of_layers_come_back_as_they_are(case):
    model, dependencies, scores, batches = case
    layers = pl.score_layers(model, dependencies, batches, measure="loss")
    found = scale_to_loss(model, dependencies, scores.scores | layers.scores, batches)
    assert set(found) == {*scores, *layers}
    assert all(torch.equal(found[name], layers[name]) for name in layers)
    one = scale_to_loss(model, dependencies, scores, batches, families="layers.0.mlp_neuron")
    assert list(one) == ["layers.0.mlp_neuron"]


def test_bad_input(case):
    model, dependencies, scores, batches = case
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        scale_to_loss(model, dependencies, scores, batches, ratio=0.0)
    with pytest.raises(ValueError, match="growth must be at least 1"):
        scale_to_loss(model, dependencies, scores, batches, growth=0.5)
    with pytest.raises(ValueError, match="at least 2 sequences"):
        scale_to_loss(model, dependencies, scores, batches[:1])
    negative = ImportanceScores.from_dict({"layers.0.mlp_neuron": -scores["layers.0.mlp_neuron"]})
    with pytest.raises(ValueError, match="negative"):
        scale_to_loss(model, dependencies, negative, batches)
    with pytest.raises(ValueError, match="no family to scale"):
        scale_to_loss(model, dependencies, scores, batches, families=[])
    with pytest.raises(ValueError, match=r"micro_batch_size.*at least 1"):
        scale_to_loss(model, dependencies, scores, batches, micro_batch_size=0)
