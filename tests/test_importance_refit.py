"""Costs of what is fitted again before it is measured, several shares at once, and the divergence."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from zoo import tiny

import pruner_lib as pl
from pruner_lib.importance import scale_to_loss
from pruner_lib.importance.calibration import token_losses, untouched
from pruner_lib.importance.loss_curve import scores_in_nats
from pruner_lib.importance.refitting import Readers
from pruner_lib.readers.matrices import as_matrix, set_matrix

KINDS = ("attention_head", "mlp_neuron")
RIDGE = 0.1


def setting(name: str):
    model = tiny(name).eval()
    dependencies = pl.discover(model)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 64, (6, 12), generator=generator)
    text = torch.randint(0, 64, (20, 12), generator=generator)
    families = dependencies.select(kind=KINDS)
    scores = pl.estimate_importance(model, dependencies, batches, criterion="l2", families=families)
    return model, dependencies, scores, batches, text


@pytest.fixture(scope="module")
def case():
    return setting("llama")


def by_regression(model, text, path, before, gone):
    """The reader's new weights and bias from a plain regression on the tokens themselves."""
    module, seen = model.get_submodule(path), {}

    def keep(key):
        return lambda module, args: seen.update({key: args[0].flatten(0, -2).double()})

    handles = [module.register_forward_pre_hook(keep("h"))]
    handles.append(model.get_submodule(before).register_forward_pre_hook(keep("state")))
    with torch.no_grad():
        model(text)
    for handle in handles:
        handle.remove()
    root = seen["state"].square().mean(-1).rsqrt()[:, None]
    weight, h = as_matrix(module), seen["h"]
    kept = [channel for channel in range(h.shape[1]) if channel not in set(gone)]
    bias = None if getattr(module, "bias", None) is None else module.bias.double()
    target = h @ weight.T
    if bias is not None:
        share = root.square() / root.square().sum()
        mean, centre = (share * h).sum(0), (share * target).sum(0)
        h, target = h - mean, target - centre
    x, y = root * h[:, kept], root * (target - h[:, kept] @ weight[:, kept].T)
    shrink = RIDGE * x.square().sum(0).mean().sqrt() ** 2
    # Ridge as least squares with extra rows: nothing of the formula under test.
    rows = torch.cat([x, shrink.sqrt() * torch.eye(len(kept)).double()])
    change = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(len(kept), y.shape[1]).double()])).solution
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = weight[:, kept] + change.T
    return fitted, None if bias is None else bias + centre - fitted @ mean


@pytest.mark.parametrize(
    ("name", "kind", "path", "before"),
    [
        ("llama", "mlp_neuron", "model.layers.1.mlp.down_proj", "model.layers.1.post_attention_layernorm"),
        ("llama", "attention_head", "model.layers.1.self_attn.o_proj", "model.layers.1.input_layernorm"),
        ("gpt2", "mlp_neuron", "transformer.h.1.mlp.c_proj", "transformer.h.1.ln_2"),
    ],
)  # fmt: skip
def test_a_reader_is_fitted_as_by_plain_regression(name, kind, path, before):
    model, dependencies, _, _, text = setting(name)
    found = dependencies.family(f"layers.1.{kind}")
    groups = list(range(found.size // 2))
    with untouched(model), torch.no_grad():
        readers = Readers(model, dependencies, dependencies.select(kind=KINDS), text, RIDGE)
        readers.next_layer()
        weights = readers.next_layer().without(found, groups)
    assert list(weights) == [model.get_submodule(path)]
    [(weight, bias)] = weights.values()
    inward = next(piece for piece in found.slices if piece.parameter == f"{path}.weight")
    expected, moved = by_regression(model, text, path, before, inward.of(groups).tolist())
    assert torch.allclose(weight, expected, atol=1e-5)
    assert (bias is None and moved is None) or torch.allclose(bias, moved, atol=1e-5)


def divergence(model, changed, batches):
    """KL of every sequence, the plain way."""
    with torch.no_grad():
        p, q = (m(batches).logits[:, :-1].double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum(-1).mean(1)


def test_the_divergence_of_a_set_is_its_own(case):
    model, dependencies, scores, batches, _ = case
    name = "layers.1.mlp_neuron"
    found = scale_to_loss(model, dependencies, scores, batches, measure="divergence")
    lowest = scores[name].argsort()[: round(len(scores[name]) / 3)].tolist()
    each = divergence(model, dependencies.zero(model, {name: lowest}), batches)
    expected = max(float(each.mean()), float(each.std()) / len(each) ** 0.5)
    assert float(found[name][lowest].sum()) == pytest.approx(expected, rel=1e-4)
    assert "scaled to the divergence" in found.criterion


def test_the_cost_is_that_of_the_fitted_model(case):
    model, dependencies, scores, batches, text = case
    name, path = "layers.0.mlp_neuron", "model.layers.0.mlp.down_proj"
    found = scale_to_loss(model, dependencies, scores, batches, measure="divergence", compensate=text)
    lowest = scores[name].argsort()[: round(len(scores[name]) / 3)].tolist()
    weight, _ = by_regression(model, text, path, "model.layers.0.post_attention_layernorm", lowest)
    fitted = copy.deepcopy(model)
    set_matrix(fitted.get_submodule(path), weight)
    each = divergence(model, fitted, batches)
    expected = max(float(each.mean()), float(each.std()) / len(each) ** 0.5)
    assert float(found[name][lowest].sum()) == pytest.approx(expected, rel=1e-4)
    plain = scale_to_loss(model, dependencies, scores, batches, measure="divergence")
    assert sum(float(found[n].sum()) for n in found) < sum(float(plain[n].sum()) for n in plain)


def test_pieces_and_whole_passes_give_the_same(case, monkeypatch):
    model, dependencies, scores, batches, text = case
    several = {"ratio": (0.25, 0.5), "measure": "divergence"}
    whole = scale_to_loss(model, dependencies, scores, batches, compensate=text, **several)
    pieces = scale_to_loss(
        model, dependencies, scores, batches, compensate=text, micro_batch_size=2, **several
    )
    plain = scale_to_loss(model, dependencies, scores, batches, **several)
    monkeypatch.setattr("pruner_lib.importance.loss_scale.layer_index", lambda model, family: None)
    slow = scale_to_loss(model, dependencies, scores, batches, **several)
    for name in scores:
        assert torch.allclose(whole[name], pieces[name], rtol=1e-3)
        assert torch.allclose(plain[name], slow[name], rtol=1e-3)
        assert not torch.allclose(whole[name], plain[name], rtol=1e-3)


def test_the_model_comes_back_bit_for_bit(case):
    model, dependencies, scores, batches, text = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale_to_loss(model, dependencies, scores, batches, compensate=text)
    broken = text.clone()
    with pytest.raises(FloatingPointError), _nan_in(model, "model.layers.1.mlp.up_proj.weight"):
        scale_to_loss(model, dependencies, scores, batches, compensate=broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class _nan_in:
    """One NaN in a parameter for a while."""

    def __init__(self, model, name):
        self.parameter = model.get_parameter(name)

    def __enter__(self):
        self.value = self.parameter.data[0, 0].clone()
        self.parameter.data[0, 0] = float("nan")

    def __exit__(self, *error):
        self.parameter.data[0, 0] = self.value


def test_experts_that_a_router_picks_stay_as_they_are():
    model, dependencies, scores, batches, text = setting("mixtral")
    experts = [name for name in scores if "mlp" in name]
    assert experts
    plain = scale_to_loss(model, dependencies, scores, batches, families=experts)
    fitted = scale_to_loss(model, dependencies, scores, batches, families=experts, compensate=text)
    assert all(torch.allclose(plain[name], fitted[name]) for name in experts)


def costs(table):
    """A made-up measurement: the number of groups in a set to its cost, the same on every sequence."""
    return lambda sets: torch.tensor([[table[len(one)]] * 4 for one in sets], dtype=torch.float64)


def test_several_shares_make_a_curve_through_what_they_cost():
    values = torch.arange(1.0, 13.0)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    measured = {2: 0.1, 4: 0.4, 6: 1.0, 8: 2.0}
    found = scores_in_nats(values, (1 / 6, 1 / 3, 1 / 2, 2 / 3), 2.0, costs(measured))
    ordered = found[values.argsort()]
    assert torch.equal(found.argsort(), values.argsort()) and bool((ordered.diff() > 0).all())
    for count, cost in measured.items():
        assert float(ordered[:count].sum()) == pytest.approx(cost)
    steps = ordered / values.sort().values.double()
    assert float(steps[8]) == pytest.approx(2 * float(steps[7]))  # beyond the last point


def test_a_share_that_costs_less_than_its_part_is_drawn_under():
    """Neighbours say that 4 cost too much: the curve stays convex, so that the order stays."""
    values = torch.arange(9.0, 21.0)
    found = scores_in_nats(values, (1 / 6, 1 / 3, 1 / 2), 2.0, costs({2: 0.1, 4: 0.9, 6: 0.5}))
    assert bool((found.diff() > 0).all())
    assert float(found[:2].sum()) == pytest.approx(0.1) and float(found[:6].sum()) == pytest.approx(0.5)
    assert float(found[:4].sum()) < 0.5


def test_few_groups_are_measured_together_too():
    alone = {0: 0.3, 1: 0.1, 2: 0.2}

    def measured(sets):
        each = [alone[one[0]] if len(one) == 1 else 0.5 for one in sets]
        assert all(one in ([0], [1], [2], [1, 2]) for one in sets)
        return torch.tensor([[cost] * 4 for cost in each], dtype=torch.float64)

    found = scores_in_nats(torch.zeros(3), (0.3, 0.6), 2.0, measured)
    assert found.tolist() == pytest.approx([0.4, 0.1, 0.4])  # the two lowest cost 0.5 together


OTHERS = ("gemma2", "gpt_neox", "falcon_new", "deepseek_v3", "nn.TransformerEncoderLayer")


@pytest.mark.parametrize("name", [*OTHERS, "invented (braid)"])
def test_any_layout_is_measured_and_left_as_it_was(name):
    """Norms behind sublayers, parallel blocks, fused matrices, experts, other readers, new code."""
    model, dependencies, scores, batches, text = setting(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    several = {"ratio": (0.3, 0.6), "measure": "divergence"}
    plain = scale_to_loss(model, dependencies, scores, batches, **several)
    fitted = scale_to_loss(model, dependencies, scores, batches, compensate=text, **several)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    total, mended = (sum(float(found[key].sum()) for key in found) for found in (plain, fitted))
    assert mended < total


@pytest.mark.parametrize(
    ("name", "kind", "cut"),
    [("bitnet", KINDS, 4), ("olmo2", KINDS, 2), ("llama", ("hidden_channel",), 1)],
)
def test_what_is_measured_as_cut_is_said(name, kind, cut):
    """Channels that are normed together, and those of the whole model."""
    model = tiny(name).eval()
    dependencies = pl.discover(model)
    batches = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(0))
    scores = {family.name: torch.ones(family.size) for family in dependencies.select(kind=kind)}
    plain = scale_to_loss(model, dependencies, scores, batches[:6])
    with pytest.warns(UserWarning, match="measured as cut, without a fit"):
        fitted = scale_to_loss(model, dependencies, scores, batches[:6], compensate=batches[6:])
    assert sum(torch.allclose(plain[family], fitted[family]) for family in scores) == cut


def test_as_many_experts_stay_as_the_router_chooses():
    model, dependencies, _, batches, _ = setting("mixtral")
    family = dependencies.select(kind="expert")[0]
    assert family.at_least == 2 and family.size == 4
    scores = {family.name: torch.ones(family.size)}
    found = scale_to_loss(model, dependencies, scores, batches, ratio=(0.5, 0.9))[family.name]
    order = found.argsort(stable=True)
    together = loss_change(model, dependencies.zero(model, {family.name: order[:2].tolist()}), batches)
    assert float(found[order[:2]].sum()) == pytest.approx(max(together.mean(), together.std() / 6**0.5))
    many = torch.arange(1.0, 13.0)
    cut = scores_in_nats(many, (0.5, 1.0), 2.0, lambda sets: torch.ones(len(sets), 4) * len(sets[-1]), 8)
    assert len(cut) == 12 and float(cut[:8].sum()) == pytest.approx(8)
    zeros = torch.cat([torch.zeros(60), torch.ones(4)])  # of which no set tells how they share its cost
    shared = scores_in_nats(zeros, (1 / 3,), 2.0, lambda sets: torch.ones(len(sets), 4) * 0.5, 56)
    assert float(shared[:56].sum()) == pytest.approx(0.5) and bool((shared[60:] > shared[:60].max()).all())


def test_experts_of_which_none_may_go_are_left_out():
    model, dependencies, scores, batches, _ = setting("mixtral")
    family = dependencies.select(kind="expert")[0]
    needed = dataclasses.replace(family, at_least=family.size)
    families = [needed if one.name == family.name else one for one in dependencies.families]
    changed = dataclasses.replace(dependencies, families=tuple(families))
    given = {**scores.scores, family.name: torch.ones(family.size)}
    assert set(scale_to_loss(model, changed, given, batches).scores) == set(scores.scores)


@pytest.mark.parametrize("ratio", [1 / 3, (1 / 6, 1 / 3)])
def test_neurons_that_never_fire_do_not_make_the_others_free(ratio):
    """Criteria that read weights score dead neurons, too; that those cost nothing says nothing of others."""
    model, dependencies, _, batches, text = setting("opt")
    with torch.no_grad():
        first = model.model.decoder.layers[0].fc1
        first.weight[:18] *= 0.05
        first.bias[:18] = -1
    name = "layers.0.mlp_neuron"
    scores = {name: torch.cat([torch.rand(18) / 10 + 0.1, torch.rand(30) + 1])}
    found = scale_to_loss(model, dependencies, scores, batches, ratio=ratio, measure="divergence")[name]
    assert torch.equal(found.argsort()[18:], scores[name].argsort()[18:])
    alive = list(range(18, 48))
    cost = divergence(model, dependencies.zero(model, {name: alive}), text).mean()
    assert float(found[alive].sum()) > float(cost) / 2


def test_readers_whose_input_is_zero_stay_as_they_are(case):
    model, dependencies, scores, batches, text = case
    silent = copy.deepcopy(model)
    silent.model.layers[0].mlp.up_proj.weight.data.zero_()
    found = scale_to_loss(silent, dependencies, scores, batches, compensate=text)
    assert float(found["layers.0.mlp_neuron"].sum()) < 1e-6 < float(found["layers.1.mlp_neuron"].sum())


def test_what_is_not_finite_in_the_fits_text_alone_is_named(case):
    model, dependencies, scores, batches, text = case
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight.data[63] = float("nan")
    text = torch.cat([text, torch.full_like(text[:1], 63)])
    with pytest.raises(FloatingPointError, match=r"layers\.0\..*compensate="):
        scale_to_loss(broken, dependencies, scores, batches.clamp(max=62), compensate=text)


def test_too_little_text_for_the_fits_is_said(case):
    model, dependencies, scores, batches, text = case
    with pytest.warns(UserWarning, match="12 calibration tokens for 48 channels .* at least 96"):
        scale_to_loss(model, dependencies, scores, batches, compensate=text[:1])


def test_layers_that_are_no_chain_are_not_fitted():
    class Skip(torch.nn.Module):
        """Every layer reads the embedding again."""

        def __init__(self, base):
            super().__init__()
            self.base, self.layers = base, base.model.layers

        def forward(self, input_ids):
            inner = self.base.model
            hidden = first = inner.embed_tokens(input_ids)
            positions = inner.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden + 0.1 * first, position_embeddings=positions, attention_mask=None)
            return self.base.lm_head(inner.norm(hidden))

    model = Skip(tiny("llama")).eval()
    dependencies = pl.discover(model)
    batches = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    scores = {family.name: torch.ones(family.size) for family in dependencies.select(kind=KINDS)}
    assert set(scale_to_loss(model, dependencies, scores, batches).scores) == set(scores)
    with pytest.raises(ValueError, match=r"cannot fit the readers of Skip: .* Leave compensate out"):
        scale_to_loss(model, dependencies, scores, batches, compensate=batches)


def test_no_more_sequences_run_at_once_than_was_asked(case):
    model, dependencies, scores, batches, text = case
    rows = set()
    handle = model.lm_head.register_forward_hook(lambda module, args, out: rows.add(len(out)))
    shares = {"ratio": (0.1, 0.3, 0.5, 0.7), "compensate": text}
    scale_to_loss(model, dependencies, scores, batches, micro_batch_size=1, **shares)
    handle.remove()
    assert rows == {1}


def loss_change(model, changed, batches):
    """The loss change of every sequence."""
    with torch.no_grad():
        return token_losses(changed, batches) - token_losses(model, batches)


def test_bad_input(case):
    model, dependencies, scores, batches, text = case
    with pytest.raises(ValueError, match="unknown measure 'kl'; valid are loss, divergence"):
        scale_to_loss(model, dependencies, scores, batches, measure="kl")
    with pytest.raises(ValueError, match="ridge must be above 0"):
        scale_to_loss(model, dependencies, scores, batches, compensate=text, ridge=0.0)
    for ratio in ((), (0.5, 1.5), 0):
        with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
            scale_to_loss(model, dependencies, scores, batches, ratio=ratio)
    name = "layers.0.mlp_neuron"
    with pytest.raises(ValueError, match=f"20 scores for the 48 groups of {name}"):
        scale_to_loss(model, dependencies, {name: scores[name][:20]}, batches)
    with pytest.raises(ValueError, match="10063"):
        scale_to_loss(model, dependencies, scores, batches, compensate=text + 10_000)
