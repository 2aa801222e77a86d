"""Cross-check: Torch-Pruning's dependency graph against ours on Llama-like models.

Torch-Pruning follows ``grad_fn`` over modules; a group is what must go when channels of one layer go.
Where the two differ the test says who is right and proves it.
"""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn
from zoo import tiny

from pruner_lib.discovery import DependencyMap, discover

ATTENTION = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Llama with as many KV as query heads, 4 heads of 8 channels, eager: what grad_fn can follow."""
    llama = tiny("llama_mha", torch.float32)
    llama.set_attn_implementation("eager")
    llama.config.use_cache = False
    return llama


@pytest.fixture(scope="module")
def ours(model) -> DependencyMap:
    return discover(model)


def graph_of(model: nn.Module) -> torch_pruning.DependencyGraph:
    return torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs={"input_ids": torch.arange(5)[None]}, verbose=False
    )


def theirs(
    model: nn.Module, layer: str, indices: list[int], graph: torch_pruning.DependencyGraph | None = None
) -> dict[tuple[str, int], set[int]]:
    """Their group of some outputs of a layer: ``(parameter, dimension)`` to indices."""
    graph = graph or graph_of(model)
    target = model.get_submodule(layer)
    embedding = isinstance(target, nn.Embedding)
    cut = torch_pruning.prune_embedding_out_channels if embedding else torch_pruning.prune_linear_out_channels
    group = graph.get_pruning_group(target, cut, idxs=indices)
    names = {id(module): name for name, module in model.named_modules()}
    norms = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[str, int], set[int]] = {}
    for dependency, touched in group:
        module = dependency.target.module
        if isinstance(module, (nn.Linear, nn.Embedding)):
            out = "out_channels" in dependency.handler.__name__
            dim = 1 if isinstance(module, nn.Embedding) or not out else 0
            found.setdefault((f"{names[id(module)]}.weight", dim), set()).update(touched)
        elif isinstance(module, nn.Parameter):
            found.setdefault((norms[id(module)], 0), set()).update(touched)
    return found


def group_of(dependencies: DependencyMap, family: str, group: int) -> dict[tuple[str, int], set[int]]:
    found = dependencies.family(family)
    return {(s.parameter, s.dim): set(s.index[group].tolist()) for s in found.slices}


@pytest.mark.parametrize("layer", [0, 1])
def test_all_neurons_agree(model, ours, layer):
    graph = graph_of(model)
    for neuron in range(48):
        answer = theirs(model, f"model.layers.{layer}.mlp.gate_proj", [neuron], graph)
        assert answer == group_of(ours, f"layers.{layer}.mlp_neuron", neuron)


def test_all_residual_channels_agree(model, ours):
    graph = graph_of(model)
    for channel in range(32):
        answer = theirs(model, "model.embed_tokens", [channel], graph)
        assert answer == group_of(ours, "hidden_channel", channel)


def test_value_and_output_projection_agree_on_a_head(model, ours):
    head = group_of(ours, "layers.0.attention_head", 2)
    answer = theirs(model, ATTENTION + "v_proj", list(range(16, 24)))
    for place in ((ATTENTION + "v_proj.weight", 0), (ATTENTION + "o_proj.weight", 1)):
        assert answer[place] == head[place] == set(range(16, 24))


def test_they_see_no_heads_we_do(model, ours):
    """They let channel 17 of query, key, value and output go, without the rest of its head. We are right to
    ask for the head: the reshape to ``(4 heads, 8 channels)`` that follows has no place for 31 rows."""
    answer = theirs(model, ATTENTION + "v_proj", [17])
    assert all(touched == {17} for touched in answer.values())
    explained = ours.explain(ATTENTION + "v_proj.weight", 0, 17)
    assert {f.kind for f in explained.families} == {"attention_head", "value_channel"}
    short = tiny("llama_mha", torch.float32)
    parameters = dict(short.named_parameters())
    kept = torch.tensor([i for i in range(32) if i != 17])
    for name, dim in answer:
        parameters[name].data = parameters[name].data.index_select(dim, kept)
    with pytest.raises(RuntimeError, match=r"invalid for input of size|shape"):
        short(input_ids=torch.arange(5)[None])


def test_rotary_channels_are_tied_across_heads_and_layers(model, ours):
    """They tie key channel 9 to the queries' channel 9 at most. We are right to tie it to channel 1 of every
    head of every layer: all rotate with the same frequency, and one head would have one fewer."""
    answer = theirs(model, ATTENTION + "k_proj", [9])
    assert not any("layers.1" in parameter for parameter, _ in answer)
    (channel,) = ours.select(kind="qk_channel", cuttable=False)
    tied = {(s.parameter, s.dim): set(s.index[1].tolist()) for s in channel.slices}
    assert tied[ATTENTION + "k_proj.weight", 0] == {1, 5, 9, 13, 17, 21, 25, 29}
    assert tied["model.layers.1.self_attn.q_proj.weight", 0] == tied[ATTENTION + "k_proj.weight", 0]
