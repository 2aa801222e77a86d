"""What discovery shows: why slices belong together, the table, stripes on matrices; and the zeroed copy."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import tiny

from pruner_lib.discovery import discover

EXPLAINED = ("llama", "phi3", "gpt2", "falcon_new", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_slice_of_every_kind_is_explained_by_operators_of_its_modules(name):
    model = tiny(name)
    found, modules = discover(model), {path for path, _ in model.named_modules()}
    for kind in dict.fromkeys(f.kind for f in found.select()):
        family = found.select(kind=kind)[-1]
        first = family.slices[0]
        answer = found.explain(first.parameter, first.dim, int(first.index[-1, 0]))
        links = [link for link in answer.links if link.family == family.name]
        assert family.name in [f.name for f in answer.families]
        assert [(s.parameter, s.dim) for s in family.slices] == [(link.parameter, link.dim) for link in links]
        assert not links[0].because, "the slice that was asked about"
        for link in links[1:]:
            if (link.parameter, link.dim) != (first.parameter, first.dim):
                assert link.because, f"nothing says why {link.place} belongs to {family.name}"
            for step in link.because:
                operator, path = re.fullmatch(r"(\w+) \((.+)\)", step).groups()
                assert operator and (path in modules or path == "the model")
        readers = [link for link in links if link.indices]
        assert [list(link.indices) for link in readers] == [
            piece.index[answer.groups[answer.families.index(family)]].tolist() for piece in family.slices
        ]


def test_the_chain_of_a_neuron_is_the_one_written_in_the_code():
    """Llama's MLP is ``down(silu(gate(x)) * up(x))``."""
    answer = discover(tiny("llama")).explain("model.layers.1.mlp.gate_proj.weight", 0, 7)
    chains = {link.parameter.split(".")[-2]: link.because for link in answer.links}
    assert chains["gate_proj"] == ()
    assert chains["up_proj"] == ("mul (model.layers.1.mlp)",)
    assert chains["down_proj"][-1].endswith("(model.layers.1.mlp.down_proj)")


def test_explaining_what_is_not_there():
    found = discover(tiny("llama"))
    with pytest.raises(KeyError, match=r"no parameter 'model\.nothing'; known are model\.embed"):
        found.explain("model.nothing", 0, 0)
    with pytest.raises(IndexError, match=r"shape \(48, 32\): dimension 0, index 48 lies outside"):
        found.explain("model.layers.0.mlp.up_proj.weight", 0, 48)


def test_the_table_of_eighty_layers_is_that_of_two():
    def lines(layers: int) -> list[str]:
        config = AutoConfig.for_model(
            "llama", num_hidden_layers=layers, hidden_size=64, num_attention_heads=4
        )
        with torch.device("meta"):
            return str(discover(AutoModelForCausalLM.from_config(config))).splitlines()

    assert len(lines(80)) == len(lines(2)) <= 24
    assert "0–79" in "".join(lines(80))


def test_many_runs_of_layers_wrap_too():
    families = [
        replace(f, layer=2 * k) for k, f in enumerate(discover(tiny("llama")).select("mlp_neuron") * 20)
    ]
    lines = str(replace(discover(tiny("llama")), families=tuple(families))).splitlines()
    assert max(map(len, lines)) <= 100 and "76, 78" in lines[-1]


def stripes(family, groups) -> list[list[tuple[float, float, float]]]:
    """On each drawn matrix, per stripe ``(first, last, across)`` in shares of the matrix's sides."""
    figure, found = family.plot(groups), []
    for axis, piece in zip(figure.axes, family.slices, strict=False):
        matrix, *lit = [patch.get_bbox() for patch in axis.patches]
        along = [((b.y0, b.y1), b.width / matrix.width) for b in lit]
        if piece.dim == 1:
            along = [((b.x0, b.x1), b.height / matrix.height) for b in lit]
        side = matrix.height if piece.dim == 0 else matrix.width
        found.append([(first / side, last / side, across) for (first, last), across in along])
    return found


@pytest.mark.parametrize("groups", [[0], [1, 5], [47]])
def test_stripes_lie_where_the_slices_are(groups):
    """Rows of gate and up, columns of down, one of 48 each."""
    family = discover(tiny("llama")).family("layers.0.mlp_neuron")
    expected = [[(group / 48, (group + 1) / 48, 1.0) for group in groups]] * 3
    np.testing.assert_allclose(stripes(family, groups), expected, atol=1e-9)


@pytest.mark.parametrize("name", EXPLAINED)
def test_zeroing_leaves_the_model_as_it_is(name):
    model: nn.Module = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = {path: module.forward.__func__ for path, module in model.named_modules()}
    found = discover(model)
    removal = {
        f.name: [0]
        if f.partition is None
        else [int(np.flatnonzero(f.partition == p)[0]) for p in set(f.partition)]
        for f in found.select()
        if f.size > f.at_least + 1
    }
    zeroed = found.zero(model, removal)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {path: module.forward.__func__ for path, module in model.named_modules()} == forwards
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in zeroed.parameters()}
    assert not shared, "a copy, not a view"
