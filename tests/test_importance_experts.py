"""What experts read that are stored in one tensor: in the loop over experts and in one grouped product."""

import pytest
import torch
from importance_oracle import VOCABULARY, tokens_of
from torch.nn import functional

from pruner_lib.discovery import discover
from pruner_lib.importance import CRITERIA, Criterion, element_scores, estimate_importance, vector_scores
from pruner_lib.importance.evidence import PassOptions, score_parameters
from pruner_lib.importance.scoring import index_scores

TOKENS = tokens_of(3, 5)
READS = {
    "r": lambda x: x.square().mean(0).sqrt(),
    "m": lambda x: x.abs().mean(0),
    "v": lambda x: x.var(0, correction=0),
}


def mixture(implementation, experts=4):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2,
        experts_implementation=implementation,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    return model.double() if implementation == "eager" else model


def read_by_hand(model):
    """What every expert of layer 1 reads ``[experts, tokens, width]``, zero where it is not chosen."""
    experts, found = model.model.layers[1].mlp.experts, {}

    def hook(module, args):
        hidden, chosen = args[0], args[1]
        mine = torch.stack([(chosen == e).any(1) for e in range(len(experts.gate_up_proj))])
        inputs = hidden[None] * mine[..., None]
        gate, up = torch.einsum("etw,eow->eto", inputs, experts.gate_up_proj).chunk(2, dim=-1)
        found["gate_up_proj"], found["down_proj"] = inputs, functional.silu(gate) * up

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    handle.remove()
    return found


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("reads", READS)
def test_each_expert_reads_its_own_tokens(implementation, reads, size):
    model = mixture(implementation)
    plain = Criterion("plain", "", {"r": lambda r: r, "m": lambda m: m, "v": lambda v: v}[reads])
    tolerance = 1e-9 if implementation == "eager" else 1e-4
    for stack, inputs in read_by_hand(model).items():
        name = f"model.layers.1.mlp.experts.{stack}"
        found = element_scores(model, name, TOKENS, criterion=plain, micro_batch_size=size)[name]
        assert found.shape == model.get_parameter(name).shape
        expected = torch.stack([READS[reads](x) for x in inputs])[:, None].expand(found.shape)
        assert not torch.allclose(expected[0], expected[1])
        torch.testing.assert_close(found, expected.to(found), rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("criterion", ["wanda", "fluctuation", "activation"])
def test_neurons_and_experts_are_scored_alike_in_both_ways(criterion):
    eager, grouped = mixture("eager"), mixture("grouped_mm")
    dependencies = discover(grouped)
    kinds = ("mlp_neuron",) if criterion == "activation" else ("mlp_neuron", "expert")
    options = {"criterion": criterion, "families": [f.name for f in dependencies.select(kinds, layers=1)]}
    exact = estimate_importance(eager, dependencies, TOKENS, **options)
    found = estimate_importance(grouped, dependencies, TOKENS, **options)
    for family in exact:
        assert exact[family].min() > 0
        torch.testing.assert_close(found[family], exact[family], rtol=1e-4, atol=0)


def test_an_idle_expert_reads_zero():
    model = mixture("grouped_mm", experts=16)
    name = "model.layers.1.mlp.experts.down_proj"
    one = TOKENS[:1, :2]  # two tokens choose at most four of sixteen
    scores = vector_scores(model, name, one, criterion="wanda")[name][0]
    assert 2 <= int((scores > 0).sum()) <= 4


def test_a_way_that_copies_experts_together_is_refused_with_what_to_use():
    model = mixture("batched_mm")
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=r'experts.* were not seen.*experts_implementation="eager"'):
        vector_scores(model, name, TOKENS, criterion="wanda")


@pytest.mark.parametrize("criterion", ["taylor_first", "taylor_second"])
def test_experts_are_scored_by_gradients(criterion):
    model, chosen = mixture("grouped_mm"), CRITERIA[criterion]
    names = [name for name, _ in model.named_parameters() if "experts" in name]
    found = {
        way: score_parameters(model, names, TOKENS, chosen, _score(chosen), PassOptions(2, way))
        for way in ("layers", "gradients")
    }
    assert len(names) == 4 and all(values[0].shape == (4,) for values in found["layers"].values())
    for name in names:
        for dim, values in found["gradients"][name].items():
            torch.testing.assert_close(found["layers"][name][dim], values, rtol=1e-4, atol=1e-12)


def _score(criterion):
    return lambda name, weight, known, uses: index_scores(criterion, weight, known)
