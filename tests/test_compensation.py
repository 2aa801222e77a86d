"""Compensation: the closed form against brute force, copies of groups recovered whole, and bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from plain import PLAIN
from zoo import tiny

import pruner_lib as pl
from pruner_lib.importance.calibration import logits_of
from pruner_lib.pruning import Compensation, PruningError, PruningPlan, compensate
from pruner_lib.readers.fitting import Statistics, best_fit, mean_fit, ridge_fit

LAYOUTS = (
    ("llama", "mlp_neuron"),
    ("llama", "attention_head"),
    ("llama", "query_head"),
    ("gpt2", "mlp_neuron"),  # Conv1D, biases
    ("gpt2", "attention_head"),
    ("phi3", "mlp_neuron"),  # fused gate and up, fused query, key and value
    ("phi3", "attention_head"),
    ("falcon_new", "query_head"),  # parallel attention and MLP
    ("falcon_new", "mlp_neuron"),  # what the MLP returned is added to in place
    ("falcon_old", "mlp_neuron"),
    ("gptj", "mlp_neuron"),
    ("gemma2", "mlp_neuron"),  # norms behind the sublayers
    ("opt", "mlp_neuron"),  # tokens as rows
)


def tokens(model, rows=40, length=16, seed=0):
    """Text of the model's own, so that no other model can be expected to predict it better."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(3, 60, (rows, 1), generator=generator)
    with torch.no_grad():
        while found.shape[1] < length:
            chances = logits(model, found)[:, -1].double().softmax(-1)
            found = torch.cat([found, torch.multinomial(chances, 1, generator=generator)], 1)
    return found


def logits(model, batch):
    return logits_of(model, batch).detach()


def readers(family):
    """The reader's slice: the last one, along its input."""
    return family.slices[-1].parameter


def make_copy(model, family, source, target):
    """Let one group compute exactly what another computes, in place; what reads them stays."""
    state = dict(model.named_parameters())
    for piece in family.slices:
        if piece.parameter == readers(family):
            continue
        weight = state[piece.parameter]
        index = piece.index.reshape(family.size, -1)
        with torch.no_grad():
            values = weight.index_select(piece.dim, torch.from_numpy(index[source].copy()))
            weight.index_copy_(piece.dim, torch.from_numpy(index[target].copy()), values)


def pruned_by_hand(name, kind, groups):
    model = tiny(name)
    dependencies = pl.discover(model)
    return model, dependencies, {f.name: groups(f) for f in dependencies.select(kind=kind)}


@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_what_a_copy_still_computes_is_recovered_whole(name, kind):
    model, dependencies, _ = pruned_by_hand(name, kind, lambda f: ())
    removal = {}
    for family in dependencies.select(kind=kind):
        parts = np.zeros(family.size) if family.partition is None else family.partition
        pairs = [np.flatnonzero(parts == part)[:2] for part in np.unique(parts)]
        for source, target in pairs:
            make_copy(model, family, source, target)
        removal[family.name] = [target for _, target in pairs]
    plan = PruningPlan.from_removal(dependencies, removal)
    batches = tokens(model, rows=200)
    cut = pl.prune(model, plan)
    found = compensate(
        model, cut, plan, Compensation(batches, ridges=(0.0,), correct=False, weighting="none")
    )
    probe = tokens(model, rows=2, seed=1)
    with torch.no_grad():
        dense, hurt, mended = (logits(m, probe) for m in (model, cut, found.model))
    assert len(found.readers) == len(removal) and not found.left
    assert (mended - dense).abs().max() < 1e-3 * (hurt - dense).abs().max()


def test_the_closed_form_is_the_minimum():
    torch.manual_seed(0)
    h, t, w = torch.randn(50, 6).double(), torch.randn(50, 3).double(), torch.rand(50).double()
    weight, ridge = torch.randn(3, 6).double(), 0.3
    sums = Statistics.empty(6, 3, h.device)
    sums.add(h[:20], t[:20], w[:20])
    sums.add(h[20:], t[20:], w[20:])
    fitted, _ = ridge_fit(sums, weight, None, ridge)
    shrink = ridge * float(((h * h) * w[:, None]).sum(0).mean())
    rows = torch.cat([h * w.sqrt()[:, None], shrink**0.5 * torch.eye(6).double()])
    wanted = torch.cat([t * w.sqrt()[:, None], shrink**0.5 * weight.T])
    assert torch.allclose(fitted, torch.linalg.lstsq(rows, wanted).solution.T, atol=1e-7)
    direct = (w[:, None] * (h @ fitted.T - t) ** 2).sum() / (w[:, None] * t**2).sum()
    assert sums.error(fitted, None) == pytest.approx(float(direct), abs=1e-10)


def test_with_a_bias_mean_and_slope_are_both_fitted():
    torch.manual_seed(0)
    h = torch.randn(200, 4).double() + 3
    true, offset = torch.randn(2, 4).double(), torch.tensor([5.0, -2.0]).double()
    sums = Statistics.empty(4, 2, h.device)
    sums.add(h, h @ true.T + offset, torch.ones(200).double())
    fitted, bias = ridge_fit(sums, torch.zeros(2, 4).double(), torch.zeros(2).double(), 0.0)
    assert torch.allclose(fitted, true, atol=1e-5) and torch.allclose(bias, offset, atol=1e-4)
    assert sums.error(fitted, bias) < 1e-9


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_cheap_variant_puts_the_mean_right(has_bias):
    torch.manual_seed(0)
    h, t = torch.rand(100, 5).double(), torch.randn(100, 3).double() + 4
    weight = torch.randn(3, 5).double()
    bias = torch.randn(3).double() if has_bias else None
    sums = Statistics.empty(5, 3, h.device)
    sums.add(h, t, torch.ones(100).double())
    found = mean_fit(sums, sums, weight, bias)
    output = h @ found.weight.T + (found.bias if has_bias else 0)
    assert torch.allclose(output.mean(0), t.mean(0), atol=1e-9)
    assert has_bias == torch.equal(found.weight, weight)
    assert found.after < found.before


def test_no_change_is_one_of_the_choices():
    torch.manual_seed(0)
    weight = torch.randn(3, 8).double()
    noise, held = (Statistics.empty(8, 3, weight.device) for _ in range(2))
    noise.add(torch.randn(9, 8).double(), 50 * torch.randn(9, 3).double(), torch.ones(9).double())
    inputs = torch.randn(500, 8).double()
    held.add(inputs, inputs @ weight.T, torch.ones(500).double())
    found = best_fit(noise, held, weight, None, (0.0, 0.1))
    assert torch.equal(found.weight, weight) and found.ridge == float("inf")


@pytest.mark.parametrize("start", [None, 0.001, 1000.0, 7.0])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_the_best_ridge_is_found_from_everywhere(start, noise):
    generator = torch.Generator().manual_seed(0)
    true, weight = (torch.randn(3, 8, generator=generator).double() for _ in range(2))
    sums = [Statistics.empty(8, 3, weight.device) for _ in range(2)]
    for each, count in zip(sums, (40, 500), strict=True):
        inputs, away = (torch.randn(count, n, generator=generator).double() for n in (8, 3))
        each.add(inputs, inputs @ true.T + noise * away, torch.ones(count).double())
    ridges = tuple(10.0**power for power in range(-3, 4))
    found = best_fit(*sums, weight, None, ridges, start)
    every = [sums[1].error(*ridge_fit(sums[0], weight, None, ridge)) for ridge in ridges]
    assert found.after == pytest.approx(min(every), rel=1e-12)


@pytest.mark.parametrize(
    ("fitted", "held", "size"), [(28, 4, 4), (448, 64, 16), (14, 2, 2), (7, 1, 16), (24, 8, 8)]
)
def test_pieces_are_even_where_that_leaves_them_large(fitted, held, size):
    from pruner_lib.pruning.compensation.compensate import _even_size

    assert _even_size(fitted, held, 16) == size


def hidden_gap(dense, model, batches):
    """Mean squared distance of the last hidden states."""
    with torch.no_grad():
        states = [m(input_ids=batches, output_hidden_states=True).hidden_states[-1] for m in (dense, model)]
    return float((states[0] - states[1]).square().mean())


def test_later_layers_make_up_for_earlier_ones():
    model, dependencies, removal = pruned_by_hand("llama", "mlp_neuron", lambda f: range(0, f.size, 2))
    plan = PruningPlan.from_removal(dependencies, removal)
    cut, batches = pl.prune(model, plan), tokens(model, rows=256)
    gaps = [
        hidden_gap(model, compensate(model, cut, plan, settings).model, tokens(model, seed=1))
        for settings in (Compensation(batches, correct=False), Compensation(batches))
    ]
    assert gaps[1] < gaps[0] < hidden_gap(model, cut, tokens(model, seed=1))


@pytest.mark.parametrize("method", ["ridge", "bias"])
def test_held_out_loss_never_rises_and_given_models_stay(method):
    model, dependencies, removal = pruned_by_hand("gpt2", "mlp_neuron", lambda f: range(f.size // 2))
    plan = PruningPlan.from_removal(dependencies, removal)
    cut, batches = pl.prune(model, plan), tokens(model)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, cut)]
    found = compensate(model, cut, plan, Compensation(batches, method=method))
    assert found.loss_after <= found.loss_before or not found.kept
    for m, state in zip((model, cut), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())
    if not found.kept:
        assert all(torch.equal(v, before[1][k]) for k, v in found.model.state_dict().items())
    assert f"{found.loss_before:.3f}" in str(found)


def test_prune_compensates_in_one_call_and_the_result_is_ordinary():
    model, dependencies, removal = pruned_by_hand("llama", "mlp_neuron", lambda f: range(0, f.size, 3))
    plan = PruningPlan.from_removal(dependencies, removal)
    batches = tokens(model)
    together = pl.prune(model, plan, compensate=batches)
    apart = compensate(model, pl.prune(model, plan), plan, batches).model
    for name, value in together.state_dict().items():
        assert torch.equal(value, apart.state_dict()[name])
    assert together.generate(batches[:1], max_new_tokens=3, do_sample=False).shape[1] == batches.shape[1] + 3


def test_a_dropped_layer_is_made_up_for_by_the_next():
    model, dependencies, removal = pruned_by_hand(
        "llama", "mlp_neuron", lambda f: [0, 1] if f.layer == 1 else []
    )
    plan = PruningPlan.from_removal(dependencies, removal, dropped=("layers.0",))
    cut, batches = pl.prune(model, plan), tokens(model, rows=256)
    found = compensate(model, cut, plan, Compensation(batches))
    assert len(found.readers) == 1
    assert hidden_gap(model, found.model, batches) < hidden_gap(model, cut, batches)


def test_plain_modules_are_compensated_too():
    for name, make in PLAIN.items():
        model = make().double()
        dependencies = pl.discover(model)
        families = [f for f in dependencies.select(kind="mlp_neuron") if f.layer is not None]
        if not families:
            continue
        plan = PruningPlan.from_removal(dependencies, {f.name: range(0, f.size, 2) for f in families})
        try:
            found = compensate(model, pl.prune(model, plan), plan, tokens(model))
        except PruningError as error:
            assert "hidden state" in str(error), name
            continue
        assert found.readers or found.left, name


@pytest.fixture(scope="module")
def case():
    model = tiny("llama", torch.float32)
    dependencies = pl.discover(model)
    family = dependencies.select(kind="mlp_neuron")[0]
    plan = PruningPlan.from_removal(dependencies, {family.name: [0, 1]})
    return model, pl.prune(model, plan), plan, tokens(model)


class TestBadInput:
    def test_one_sequence(self, case):
        model, cut, plan, batches = case
        with pytest.raises(ValueError, match="at least 2 calibration sequences"):
            compensate(model, cut, plan, batches[:1])

    def test_too_few_tokens_warn_and_stay_sane(self, case):
        model, cut, plan, batches = case
        with pytest.warns(
            UserWarning, match=r"calibration tokens for \d+ channels.*takes at least \d+, a good one"
        ) as told:
            found = compensate(model, cut, plan, batches[:2, :4])
        assert len([one for one in told if "calibration tokens for" in str(one.message)]) == 1
        assert all(torch.isfinite(p).all() for p in found.model.parameters())
        assert all(reader.after <= reader.before for reader in found.readers)

    def test_no_weights(self, case):
        model, _, plan, batches = case
        empty = copy.deepcopy(model).to("meta")
        with pytest.raises(PruningError, match="meta device"):
            compensate(empty, pl.prune(empty, plan), plan, batches)

    def test_activations_that_are_no_numbers(self, case):
        model, _, plan, batches = case
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.model.layers[0].mlp.up_proj.weight[5] = float("nan")
        with pytest.raises(FloatingPointError, match=r"layers\.0\.mlp\.down_proj"):
            compensate(broken, pl.prune(broken, plan), plan, batches)

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"method": "lasso"}, "valid are ridge, bias"),
            ({"weighting": "all"}, "valid are rms, none"),
            ({"ridges": ()}, "one or more"),
            ({"ridges": (-1.0,)}, "at least 0"),
            ({"holdout": 1.0}, "between 0 and 1"),
        ],
    )
    def test_settings(self, case, wrong, says):
        with pytest.raises(ValueError, match=says):
            Compensation(case[3], **wrong)

    def test_readers_that_several_modules_share_stay_as_cut(self):
        model = tiny("llama", torch.float32)
        first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
        second.down_proj.weight = first.down_proj.weight
        dependencies = pl.discover(model)
        family = dependencies.select(kind="mlp_neuron")[0]
        plan = PruningPlan.from_removal(dependencies, {family.name: [0, 1]})
        found = compensate(model, pl.prune(model, plan), plan, tokens(model))
        assert not found.readers and len(found.left) == 1 and "left as cut" in str(found)

    def test_experts_in_one_tensor_stay_as_cut(self):
        model = tiny("mixtral", torch.float32)
        dependencies = pl.discover(model)
        families = dependencies.select(kind="mlp_neuron")
        plan = PruningPlan.from_removal(dependencies, {f.name: range(8) for f in families})
        found = compensate(model, pl.prune(model, plan), plan, tokens(model))
        assert all("experts" in name for name in found.left) and found.left
