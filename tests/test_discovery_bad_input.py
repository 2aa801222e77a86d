"""What discovery does with models it was not made for: it works, or one sentence says what to do."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import tiny

from pruner_lib.discovery import DiscoveryError, discover
from pruner_lib.discovery.summary import rows_of
from pruner_lib.pruning import PruningError, PruningPlan, prune


class Encoder(nn.Module):
    """No decoder and no token ids: pixels in, classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, pixels, scale=None):
        return self.second(torch.relu(self.first(pixels)))


def test_other_inputs_than_token_ids_come_as_example_inputs():
    with pytest.raises(DiscoveryError, match="Pass example_inputs"):
        discover(Encoder())
    found = discover(Encoder(), example_inputs={"pixels": torch.randn(2, 12)})
    assert [(f.kind, f.size) for f in found.select()] == [("mlp_neuron", 10)]


def test_wrong_example_inputs_say_what_failed():
    with pytest.raises(DiscoveryError, match=r"with pixels: RuntimeError.*branches on values"):
        discover(Encoder(), example_inputs={"pixels": torch.randn(2, 5)})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return hidden * 2 if hidden.sum() > 0 else hidden


def test_branching_on_data_is_refused_in_words():
    with pytest.raises(DiscoveryError, match="branches on values"):
        discover(Branching())


def test_parameters_on_several_devices_are_fine():
    model = tiny("llama")
    model.model.layers[1].to("meta")
    assert [f.name for f in discover(model).families] == [f.name for f in discover(tiny("llama")).families]


@pytest.mark.parametrize("way", ["offload", "dispatch"])
def test_a_model_that_accelerate_spread_is_what_it_was(way):
    from accelerate import cpu_offload, dispatch_model

    model, families = tiny("llama"), [f.name for f in discover(tiny("llama")).families]
    if way == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    before = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(before).logits
        assert [f.name for f in discover(model).families] == families
        assert torch.equal(model(before).logits, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("gpt2",), "wants a model .* not 'gpt2'"),
        ((nn.Linear(2, 2), torch.ones(1, 2)), "keyword arguments .* not a Tensor"),
    ],
)
def test_what_is_no_model_or_no_mapping_is_named(given, message):
    with pytest.raises(TypeError, match=message):
        discover(given[0], example_inputs=given[1] if len(given) > 1 else None)


class Quantised(nn.Module):
    """Whole-number weights, unpacked in the forward: what most quantisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.register_parameter(
            "packed", nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
        )

    def forward(self, input_ids):
        return self.embed(input_ids) @ self.packed.to(torch.float32).T


def test_quantised_parameters_are_refused_with_the_way_out():
    with pytest.raises(DiscoveryError, match=r"packed.*int8.*Load the model unquantised"):
        discover(Quantised())


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize:UserWarning"
)
def test_torchs_own_quantisation_and_eight_bit_floats_are_named():
    dynamic = torch.ao.quantization.quantize_dynamic(Twice(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(DiscoveryError, match=r"_packed_params is stored as qint8: this model is quantised"):
        discover(dynamic)
    eight = Twice()
    eight.last.weight = nn.Parameter(eight.last.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(DiscoveryError, match=r"last.weight is stored as float8_e4m3fn.*unquantised"):
        discover(eight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_new"])
@pytest.mark.parametrize("first", ["input_ids", "attention_mask"])
def test_a_mask_among_the_example_inputs_changes_nothing(name, first):
    ids = torch.arange(8).reshape(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = discover(tiny(name), example_inputs=dict(sorted(inputs.items(), key=lambda i: i[0] != first)))
    expected = discover(tiny(name))
    assert [(f.name, f.size, f.blocked) for f in found.families] == [
        (f.name, f.size, f.blocked) for f in expected.families
    ]


class Chooser(nn.Module):
    """Each token keeps the two largest of its six neurons."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(9, 8)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        neurons = torch.relu(self.first(hidden))
        largest, where = neurons.topk(2, dim=-1)
        if self.way == "values":
            neurons = torch.zeros_like(neurons).scatter(-1, where, largest)
        else:
            neurons = neurons * torch.zeros_like(neurons).scatter(-1, where, 1.0)
        return self.head(hidden + self.second(neurons))


@pytest.mark.parametrize("way", ["values", "mask"])
def test_neurons_that_top_k_chooses_among_are_blocked(way):
    found = discover(Chooser(way))
    (neurons,) = [
        f for f in found.families if any(s.parameter == "first.weight" and not s.dim for s in f.slices)
    ]
    assert neurons.kind == "mlp_neuron" and "compete or have an order (topk" in neurons.blocked


class Unread(nn.Module):
    """Has a second head for training, which the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.spare = nn.Linear(5, 7)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_what_the_call_does_not_read_is_blocked():
    found = discover(Unread())
    spare = [f for f in found.families if any(s.parameter.startswith("spare") for s in f.slices)]
    assert spare and all("does not read spare." in f.blocked for f in spare)
    inputs = {"inputs_embeds": torch.randn(1, 4, 32), "use_cache": False}
    found = discover(tiny("llama"), example_inputs=inputs)
    embedding = [f for f in found.families if f.slices[0].parameter == "model.embed_tokens.weight"]
    assert embedding and all("does not read model.embed_tokens.weight" in f.blocked for f in embedding)
    assert {f.kind for f in found.select()} == {"attention_head", "query_head", "mlp_neuron"}


def test_a_model_without_layers_has_its_width_only():
    model = tiny("llama")
    model.model.layers = nn.ModuleList()
    model.config.num_hidden_layers = 0
    found = discover(model)
    assert (found.num_layers, [f.kind for f in found.select()]) == (0, ["hidden_channel"])


def test_a_module_without_parameters_has_no_families():
    found = discover(nn.Identity(), example_inputs={"input": torch.ones(1, 3)})
    assert found.families == () and "0 families" in str(found)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.inner = nn.Linear(6, 6, bias=False)
        self.again = self.inner
        self.last = nn.Linear(6, 3)

    def forward(self, input_ids):
        return self.last(torch.relu(self.again(torch.relu(self.inner(self.embed(input_ids))))))


def test_a_parameter_under_two_names_is_one():
    found = discover(Twice())
    assert found.aliases == {"again.weight": "inner.weight"}
    (family,) = found.select()
    assert {(s.parameter, s.dim) for s in family.slices} == {
        *((name, d) for name, d in (("embed.weight", 1), ("inner.weight", 0), ("inner.weight", 1))),
        ("last.weight", 1),
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_training_mode_and_hooks_change_nothing(name):
    model = tiny(name).train()
    calls = []
    model.register_forward_hook(lambda *ignored: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = copy.deepcopy(model.config.to_dict())
    rng = torch.get_rng_state()
    names = [f.name for f in discover(model).families]
    assert names == [f.name for f in discover(tiny(name)).families]
    assert model.training and not calls and torch.equal(torch.get_rng_state(), rng)
    assert model.config.to_dict() == chosen
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Sorting(nn.Module):
    """Uses an operator without a rule beside neurons that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)
        self.odd, self.head = nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        hidden = hidden + self.second(torch.relu(self.first(hidden)))
        return self.head(torch.renorm(self.odd(hidden)[0], 2, 0, 1.0))


def test_an_operator_without_a_rule_blocks_what_it_touches_and_nothing_else():
    model = Sorting()
    found = discover(model)
    assert list(found.without_rule) == ["renorm"]
    assert "no rule for renorm" in str(found) and "no rule for renorm" in found._repr_html_()
    assert {f.kind for f in found.select()} == {"mlp_neuron", "hidden_channel"}
    for family in found.families:
        touched = any((s.parameter, s.dim) in {("odd.weight", 0), ("odd.bias", 0)} for s in family.slices)
        assert not touched or "no rule" in family.blocked
    with pytest.raises(ValueError, match="no rule for the operator renorm"):
        blocked = next(f for f in found.families if f.blocked and "no rule" in f.blocked)
        PruningPlan.from_removal(found, {blocked.name: [0]})


class Linearised(nn.Module):
    """Linear attention: ``elu(k) + 1`` turns a zeroed channel into ones."""

    def __init__(self, kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.embed = nn.Embedding(9, 8)
        self.q, self.k, self.v = (nn.Linear(8, width, bias=False) for width in (6, 6, 10))
        self.o, self.head = nn.Linear(10, 8, bias=False), nn.Linear(8, 9)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        state = self.kernel(self.k(x)).transpose(1, 2) @ self.v(x)
        return self.head(x + self.o(self.kernel(self.q(x)) @ state))


def test_what_does_not_stay_zero_is_blocked():
    loud = discover(Linearised(lambda x: torch.nn.functional.elu(x) + 1))
    quiet = discover(Linearised(torch.relu))
    assert [f.kind for f in quiet.select()] == ["hidden_channel", "qk_channel"] or len(quiet.select()) == 3
    (blocked,) = [f for f in loud.families if any(s.parameter == "q.weight" and s.dim == 0 for s in f.slices)]
    assert "turns its zeros into something else" in blocked.blocked


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: torch.nn.functional.hardtanh(h, 0.5, 1.0).sum(-1, keepdim=True),
        lambda h: torch.lerp(h.sigmoid(), h, h).sum(-1, keepdim=True),
    ],
    ids=["hardtanh", "lerp"],
)
def test_what_lifts_zeros_before_a_sum_blocks_the_neurons(mix):
    class Mixed(Linearised):
        def forward(self, input_ids):
            hidden = torch.relu(self.v(self.embed(input_ids)))
            return self.head(self.o(hidden * mix(hidden)))

    found = discover(Mixed(None))
    (neurons,) = [
        f for f in found.families if any(s.parameter == "v.weight" and s.dim == 0 for s in f.slices)
    ]
    assert "turns its zeros into something else" in neurons.blocked


@dataclasses.dataclass
class Returned:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [Returned, lambda x: SimpleNamespace(logits=x, more=3), lambda x: ((x,),), lambda x: {"other": [x]}],
)
def test_what_is_returned_is_found_in_any_form(wrap):
    """Else the vocabulary could be cut."""

    class Wrapped(Scaled):
        def forward(self, input_ids):
            return wrap(super().forward(input_ids))

    found = discover(Wrapped())
    (rows,) = [
        f for f in found.families if any(s.parameter == "head.weight" and s.dim == 0 for s in f.slices)
    ]
    assert "the model returns it" in rows.blocked


def test_a_result_without_a_tensor_is_refused():
    class Silent(Scaled):
        def forward(self, input_ids):
            super().forward(input_ids)

    with pytest.raises(DiscoveryError, match="returns NoneType, in which no tensor was found"):
        discover(Silent())


@pytest.mark.parametrize("groups", [[-1], [99], [0.7], [True, False], 3])
def test_only_groups_that_are_there_are_zeroed(groups):
    model = tiny("llama")
    found = discover(model)
    with pytest.raises(ValueError, match=r"no group|whole numbers"):
        found.zero(model, {"layers.0.mlp_neuron": groups})
    with pytest.raises(ValueError, match=r"no group|whole numbers"):
        PruningPlan.from_removal(found, {"layers.0.mlp_neuron": groups})


def test_inside_inference_mode_and_with_flex_attention():
    expected = discover(tiny("llama"))
    with torch.inference_mode():
        inside = discover(tiny("llama"))
    flexible = tiny("llama")
    flexible.config._attn_implementation = "flex_attention"
    for found in (inside, discover(flexible)):
        assert [(f.name, f.size, f.blocked) for f in found.families] == [
            (f.name, f.size, f.blocked) for f in expected.families
        ]


class Scaled(nn.Module):
    """Scales by the number of channels it finds, so that no cut of them equals zeroing."""

    def __init__(self, scale=lambda scores, size: scores / size**0.5) -> None:
        super().__init__()
        self.scale = scale
        self.embed = nn.Embedding(9, 8)
        self.q, self.k, self.v = (nn.Linear(8, width, bias=False) for width in (6, 6, 10))
        self.o, self.head = nn.Linear(10, 8, bias=False), nn.Linear(8, 9)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        query, key = self.q(x), self.k(x)
        weights = self.scale(query @ key.transpose(1, 2), query.shape[-1]).softmax(-1)
        return self.head(x + self.o(weights @ self.v(x)))


SCALES = {
    "division": lambda scores, size: scores / size**0.5,
    "a tensor": lambda scores, size: scores / torch.tensor(float(size)).sqrt(),
    "a tensor of the size": lambda scores, size: scores / torch.tensor(size).sqrt(),
    "a filled tensor": lambda scores, size: scores / torch.full([], size**0.5),
    "one like another": lambda scores, size: scores * torch.full_like(scores, size**-0.5),
    "a weight of a sum": lambda scores, size: torch.add(scores, scores, alpha=size**-0.5),
}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_that_follows_the_size_refuses_the_cut(scale):
    model = Scaled(SCALES[scale])
    found = discover(model)
    (channels,) = [
        f for f in found.select() if any(s.parameter == "q.weight" and s.dim == 0 for s in f.slices)
    ]
    with pytest.raises(PruningError, match="a number in its code moved with the cut"):
        prune(model, PruningPlan.from_removal(found, {channels.name: [0, 1]}))


def test_families_and_maps_draw_themselves():
    found = discover(tiny("phi3"))
    assert found.family("layers.1.mlp_neuron").plot([0, 5]).axes
    assert found.plot().axes and found.plot("hidden_channel", 3).axes
    assert found._repr_html_().count("<tr") == 1 + len(rows_of(found.families))
