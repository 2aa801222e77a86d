"""Compensation where sums round, systems are singular, precision is half, or experts are routed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from zoo import tiny

import pruner_lib as pl
from pruner_lib.importance.streams import Stream
from pruner_lib.pruning import Compensation, PruningPlan, compensate
from pruner_lib.readers.fitting import Statistics, best_fit, ridge_fit
from pruner_lib.readers.matrices import residual_writers


def text(rows=8, length=16, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def halves(dependencies, kind="mlp_neuron"):
    families = dependencies.select(kind=kind)
    return PruningPlan.from_removal(dependencies, {f.name: range(0, f.size, 2) for f in families})


def run(model, plan, settings):
    return compensate(model, pl.prune(model, plan), plan, settings)


def factors(model):
    """c of every layer, as the text shows it."""
    dependencies = pl.discover(model)
    found = []
    with torch.no_grad():
        stream = Stream(model, [text()])
        for number, layer in enumerate(stream.layers):
            writers = residual_writers(dependencies, layer, f"model.layers.{number}")
            after, written = stream.run(0, writers)
            found.append(stream.factor(writers, written, after))
            stream.advance([after])
    return found


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "factor"), [("gemma2", None), ("gemma3", None), ("olmo2", None), ("llama", 1.0)]
)
def test_half_precision_sees_the_same_form_of_layers(name, factor, dtype, scale):
    model = tiny(name, dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    wanted = [factor] * 2 if factor is None else pytest.approx([factor] * 2, rel=1e-3)
    assert factors(model) == wanted


def test_a_large_mean_does_not_drown_what_lies_around_it():
    torch.manual_seed(0)
    h = torch.randn(4000, 32) + 3000 * torch.rand(32)
    true, offset = torch.randn(4, 32).double(), torch.randn(4).double()
    sums = Statistics.empty(32, 4, h.device, centred=True)
    for piece in h.split(1000):
        sums.add(piece, (piece.double() @ true.T + offset).float(), torch.rand(1000) + 0.5)
    fitted, bias = ridge_fit(sums, torch.zeros(4, 32).double(), torch.zeros(4).double(), 0.0)
    assert (fitted - true).abs().max() < 1e-3
    assert abs(sums.error(fitted, bias)) < 1e-12 < sums.error(true + 0.01, offset)
    assert sums.error(0 * true, 0 * offset) == pytest.approx(1.0, rel=1e-6)


def test_biased_models_with_large_inputs_are_fitted():
    model = tiny("opt", torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.fill_(500.0)  # every neuron on, and nearly constant
    found = run(model, halves(pl.discover(model)), text(64))
    assert found.loss_after <= found.loss_before
    assert all(torch.isfinite(parameter).all() for parameter in found.model.parameters())


def test_a_reader_of_nothing_stays_as_cut():
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    found = run(model, halves(pl.discover(model)), text(64))
    dead, alive = found.readers
    assert dead.ridge == float("inf") and alive.after < alive.before


def test_least_squares_with_too_few_tokens_is_no_fit():
    sums = Statistics.empty(8, 2, torch.device("cpu"))
    sums.add(torch.ones(3, 8).double(), torch.ones(3, 2).double(), torch.ones(3).double())
    sums.second -= 1e-3 * torch.eye(8).double()  # as rounding may leave it
    weight = torch.zeros(2, 8).double()
    assert torch.equal(best_fit(sums, sums, weight, None, (0.0,)).weight, weight)
    assert best_fit(sums, sums, weight, None, (0.0, 1e-9, 1.0)).ridge == 1.0


@pytest.mark.parametrize(("rows", "holdout"), [(2, 0.8), (8, 0.95), (8, 0.01)])
def test_both_parts_of_the_text_hold_a_sequence(rows, holdout):
    settings = Compensation(text(rows), holdout=holdout)
    assert 1 <= settings.split() < rows
    model = tiny("llama", torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ calibration tokens for")
        run(model, halves(pl.discover(model)), settings)


def test_channels_and_a_sublayer_go_together():
    model = tiny("llama", torch.float32)
    dependencies = pl.discover(model)
    plan = PruningPlan.from_removal(dependencies, {"hidden_channel": [0, 1]}, dropped=["layers.0.attention"])
    found = run(model, plan, text(32))
    assert not any("layers.0.self_attn" in reader.weight for reader in found.readers)
    assert any("layers.1.self_attn" in reader.weight for reader in found.readers)


class Experts(nn.Module):
    """One expert per token, each a module of its own."""

    def __init__(self, width, inner, count=4):
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(count)
        )

    def forward(self, x):
        flat = x.flatten(0, -2)
        shares = self.gate(flat).softmax(-1)
        if flat.is_meta:
            return sum(e(flat) * shares[:, i : i + 1] for i, e in enumerate(self.experts)).view_as(x)
        chosen, out = shares.max(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen.indices == number).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(flat[rows]) * chosen.values[rows, None]
        return out.view_as(x)


def test_routed_experts_stay_as_cut():
    model = tiny("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp = Experts(32, 16)
    plan = halves(pl.discover(model))
    found = run(model, plan, Compensation(text(16, 4), micro_batch_size=1))
    assert not found.readers
    assert len(found.left) == 8 and all(name.endswith(".2.weight") for name in found.left)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("gpt2", {"lm_head.weight"}),  # tied: the embedding is cut, the head reads it
        ("llama", {"lm_head.weight"}),
        ("mixtral", {"lm_head.weight", "experts.gate_up_proj", "mlp.gate.weight"}),
    ],
)
def test_what_reads_channels_and_is_not_fitted_is_listed(name, left):
    model = tiny(name, torch.float32)
    plan = PruningPlan.from_removal(pl.discover(model), {"hidden_channel": [0, 1]})
    found = run(model, plan, text(64))
    assert {next((end for end in left if each.endswith(end)), each) for each in found.left} == left


def test_what_is_no_text_is_refused_before_the_cut(monkeypatch):
    model = tiny("llama", torch.float32)
    plan = halves(pl.discover(model))
    monkeypatch.setattr("pruner_lib.pruning.surgery._cut", None)
    with pytest.raises(TypeError, match=r"wants calibration token ids.*got list"):
        pl.prune(model, plan, compensate=[[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"micro_batch_size": 0}, "micro_batch_size must be at least 1"), ({"ridges": 0.1}, "one or more")],
)
def test_settings_are_checked(wrong, says):
    with pytest.raises(ValueError, match=says):
        Compensation(text(), **wrong)
