"""Discovery: groups by hand on toys, families of tiny decoders, reasons, and the zero oracle."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pruner_lib.discovery import UnknownFamilyError, discover

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def tiny(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).double().eval()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("llama", **GROUPED)


def slices(family) -> dict[tuple[str, int], list[list[int]]]:
    return {(s.parameter, s.dim): s.index.tolist() for s in family.slices}


class TwoLayers(nn.Module):
    """embed → first → relu → second, on a width of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)

    def forward(self, input_ids):
        return self.second(torch.relu(self.first(self.embed(input_ids))))


def test_two_layers_by_hand():
    found = discover(TwoLayers())
    neuron = found.select(kind="mlp_neuron")
    assert [f.size for f in neuron] == [4]
    each = [[0], [1], [2], [3]]
    assert slices(neuron[0]) == {
        ("first.weight", 0): each,
        ("first.bias", 0): each,
        ("second.weight", 1): each,
    }
    (width,) = found.select(kind="hidden_channel")
    assert slices(width) == {("embed.weight", 1): [[0], [1], [2]], ("first.weight", 1): [[0], [1], [2]]}
    (tokens, output) = found.select(kind="vocabulary", cuttable=False)
    assert "tokenizer" in tokens.blocked
    assert slices(output) == {("second.weight", 0): [[0], [1]]}


def test_grouped_query_heads_by_hand(llama):
    found = discover(llama)
    heads = slices(found.family("layers.1.attention_head"))
    base = "model.layers.1.self_attn."
    assert heads[base + "k_proj.weight", 0] == [list(range(8)), list(range(8, 16))]
    assert heads[base + "q_proj.weight", 0] == [list(range(16)), list(range(16, 32))]
    assert heads[base + "o_proj.weight", 1] == heads[base + "q_proj.weight", 0]
    assert set(heads) == {
        (base + n, d)
        for n, d in [("q_proj.weight", 0), ("k_proj.weight", 0), ("v_proj.weight", 0), ("o_proj.weight", 1)]
    }
    queries = found.family("layers.1.query_head")
    assert queries.partition.tolist() == [0, 0, 1, 1]
    assert set(slices(queries)) == {(base + "q_proj.weight", 0), (base + "o_proj.weight", 1)}


def test_rotary_ties_channels_across_layers(llama):
    (channel,) = discover(llama).select(kind="qk_channel", cuttable=False)
    index = slices(channel)
    # channel c rotates with c + 4 (half-split), in every head of every layer
    assert index["model.layers.0.self_attn.k_proj.weight", 0][1] == [1, 5, 9, 13]
    assert index["model.layers.1.self_attn.k_proj.weight", 0][1] == [1, 5, 9, 13]
    assert "inv_freq" in channel.blocked


def test_fused_layouts_come_apart():
    phi3 = discover(tiny("phi3", **GROUPED, pad_token_id=0))
    neuron = slices(phi3.family("layers.0.mlp_neuron"))
    assert neuron["model.layers.0.mlp.gate_up_proj.weight", 0][5] == [5, 53]
    heads = slices(phi3.family("layers.0.attention_head"))
    rows = heads["model.layers.0.self_attn.qkv_proj.weight", 0][1]
    assert rows == [*range(16, 32), *range(40, 48), *range(56, 64)]


def test_interleaved_fused_heads_come_apart():
    neox = discover(tiny("gpt_neox", **SMALL))
    rows = slices(neox.family("layers.0.attention_head"))[
        "gpt_neox.layers.0.attention.query_key_value.weight", 0
    ]
    assert rows[2] == list(range(48, 72))


def test_heads_tied_to_alibi_are_blocked():
    bloom = discover(tiny("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    heads = bloom.select(kind="attention_head", cuttable=False)
    assert len(heads) == 2
    assert all("fixes for each index" in f.blocked for f in heads)


def test_eager_and_fused_attention_agree(llama):
    eager = AutoModelForCausalLM.from_config(llama.config, attn_implementation="eager")
    found, again = discover(llama), discover(eager)
    assert [(f.name, f.blocked) for f in again.families] == [(f.name, f.blocked) for f in found.families]
    for one, other in zip(found.families, again.families, strict=True):
        assert slices(one) == slices(other)


def test_discovery_leaves_the_model_alone(llama):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    llama.train()
    discover(llama)
    assert llama.training
    llama.eval()
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_meta_models_need_no_weights(llama):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llama.config)
    assert [f.name for f in discover(empty).families] == [f.name for f in discover(llama).families]


def test_tied_parameters_are_one():
    tied = tiny("llama", **GROUPED, tie_word_embeddings=True)
    found = discover(tied)
    assert found.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not any(s.parameter == "lm_head.weight" for f in found.families for s in f.slices)


def test_explain_names_operators_and_modules(llama):
    answer = discover(llama).explain("model.layers.0.mlp.gate_proj.weight", 0, 3)
    assert [f.name for f in answer.families] == ["layers.0.mlp_neuron"]
    down = next(link for link in answer.links if "down_proj" in link.parameter)
    assert down.indices == (3,)
    assert any("mlp" in step for step in down.because)
    assert "mul" in str(answer)


def test_print_fits_a_screen(llama):
    deep = tiny("llama", **{**GROUPED, "num_hidden_layers": 12})
    text = str(discover(deep))
    assert len(text.splitlines()) <= 24
    (neurons,) = [line.split() for line in text.splitlines() if "mlp_neuron" in line]
    assert neurons == ["mlp_neuron", "12", "48", "0–11"]


def test_unknown_family_lists_near_names(llama):
    with pytest.raises(UnknownFamilyError, match=r"layers\.1\.mlp_neuron"):
        discover(llama).family("layers.1.mlp_neurons")


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        return model(input_ids=ids).logits


def by_hand(model: nn.Module, family, group: int) -> nn.Module:
    """Zero the readers only: what a neuron or head that is gone must amount to."""
    other = copy.deepcopy(model)
    last = family.slices[-1]
    weight = dict(other.named_parameters())[last.parameter]
    with torch.no_grad():
        weight.index_fill_(last.dim, torch.from_numpy(last.of([group])), 0)
    return other


@pytest.mark.parametrize("name", ["layers.0.mlp_neuron", "layers.1.attention_head", "layers.0.query_head"])
def test_zero_removes_the_whole_contribution(llama, name):
    found = discover(llama)
    family = found.family(name)
    zeroed = found.zero(llama, {name: [1]})
    assert torch.allclose(logits(zeroed), logits(by_hand(llama, family, 1)), atol=1e-12)
    assert not torch.allclose(logits(zeroed), logits(llama), atol=1e-6)


def test_zeroed_norms_average_over_what_remains(llama):
    found = discover(llama)
    removal = {"hidden_channel": [0, 7, 9]}
    zeroed = found.zero(llama, removal)
    kept = np.setdiff1d(np.arange(32), removal["hidden_channel"])
    norm = zeroed.model.layers[0].input_layernorm
    x = torch.randn(2, 32, dtype=torch.float64)
    plain = copy.deepcopy(llama.model.layers[0].input_layernorm)
    plain.weight = nn.Parameter(plain.weight[kept])
    assert torch.allclose(norm(x)[:, kept], plain(x[:, kept]))
    assert norm(x)[:, removal["hidden_channel"]].abs().max() == 0
