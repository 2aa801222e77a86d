"""Parameters and multiply-accumulates against arithmetic written out here."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from pruner_lib.evaluation import EvaluationError, count_cost
from pruner_lib.evaluation.cost import MatrixProducts

HIDDEN, HEADS, KV, MLP, LAYERS, VOCABULARY, HEAD_DIM = 24, 4, 2, 40, 3, 64, 6


def tiny_llama(**changes):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def expected_macs(batch, tokens):
    """Products with weights at every position, plus Q·Kᵀ and A·V of every query head."""
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    weights = LAYERS * (HIDDEN * (q + 2 * kv) + q * HIDDEN + 3 * HIDDEN * MLP) + HIDDEN * VOCABULARY
    return batch * (tokens * weights + LAYERS * 2 * HEADS * tokens * tokens * HEAD_DIM)


def expected_params(tied):
    q, kv = HEADS * HEAD_DIM, KV * HEAD_DIM
    layer = HIDDEN * (q + 2 * kv) + q * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN
    return LAYERS * layer + HIDDEN + (1 if tied else 2) * HIDDEN * VOCABULARY


def test_llama_7b_is_what_the_paper_says():
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
        )
        model = LlamaForCausalLM(config)
    cost = count_cost(model)
    assert (cost.batch_size, cost.seq_len) == (1, 64)
    assert cost.params == 6_738_415_616
    assert cost.macs == pytest.approx(424.02e9, rel=0.005)
    assert cost.macs == 64 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000) + 32 * 2 * 64 * 64 * 4096
    assert cost.kv_cache_bytes_per_token == 2 * 32 * 4096 * 4


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (1, 7), (3, 16), (1, 1)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_grouped_query_llama_by_arithmetic(batch, tokens, attention):
    cost = count_cost(tiny_llama(attn_implementation=attention), batch_size=batch, seq_len=tokens)
    assert cost.macs == expected_macs(batch, tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_count_once(tied):
    cost = count_cost(tiny_llama(tie_word_embeddings=tied))
    assert cost.params == expected_params(tied)
    assert cost.weight_bytes == 4 * cost.params
    assert cost.macs == expected_macs(1, 64), "the head multiplies all the same"


def test_bytes_follow_the_dtype():
    cost = count_cost(tiny_llama().to(torch.bfloat16))
    assert cost.weight_bytes == 2 * cost.params
    assert cost.kv_cache_bytes_per_token == 2 * LAYERS * KV * HEAD_DIM * 2


def test_meta_and_real_weights_cost_the_same_and_nothing_changes():
    model = tiny_llama()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = count_cost(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert count_cost(tiny_llama().to("meta")) == cost


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_other_layouts(kind):
    """GPT-2's Conv1D and Phi-3's fused projections do the same work as separate linear layers."""
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS
        )
        model, weights = GPT2LMHeadModel(config), LAYERS * 12 * HIDDEN**2 + HIDDEN * VOCABULARY
    else:
        config = Phi3Config(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, pad_token_id=0, max_position_embeddings=32,
        )  # fmt: skip
        model, weights = (
            Phi3ForCausalLM(config),
            LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP) + HIDDEN * VOCABULARY,
        )
    assert count_cost(model, seq_len=8).macs == 8 * weights + LAYERS * 2 * 8 * 8 * HIDDEN


def test_fused_attention_is_counted():
    """On the CPU, attention is one operator; it must count like the two products inside it."""
    query, key, value = (torch.randn(2, 4, length, 8) for length in (5, 9, 9))
    with torch.no_grad(), MatrixProducts() as counter:
        functional.scaled_dot_product_attention(query, key, value)
    assert counter.macs == 2 * 4 * 5 * 9 * (8 + 8)


def test_a_real_forward_pass_does_the_counted_work():
    model = tiny_llama()
    with torch.no_grad(), MatrixProducts() as counter:
        model(torch.zeros((2, 16), dtype=torch.long))
    assert counter.macs == count_cost(model, batch_size=2, seq_len=16).macs


def test_convolutions_are_counted():
    layer, signal = torch.nn.Conv1d(6, 8, kernel_size=3, groups=2), torch.randn(2, 6, 10)
    with torch.no_grad(), MatrixProducts() as counter:
        out = layer(signal)
    assert counter.macs == out.numel() * 3 * 3


def test_prints_its_conditions():
    assert "at 2 × 8 tokens" in str(count_cost(tiny_llama(), batch_size=2, seq_len=8))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"batch_size": 0}, "batch_size"), ({"seq_len": 65}, "64")]
)
def test_refuses_with_a_reason(arguments, message):
    with pytest.raises(EvaluationError, match=message):
        count_cost(tiny_llama(), **arguments)


def test_a_model_that_needs_its_data_is_refused():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 4)

        def forward(self, input_ids):
            return self.embed(input_ids) if input_ids.sum().item() else input_ids

    with pytest.raises(EvaluationError, match="Branching could not be run on the meta device"):
        count_cost(Branching())


def test_the_cache_per_token_is_an_average_that_falls_beyond_a_sliding_window():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    model = MistralForCausalLM(config)
    whole, beyond = (count_cost(model, seq_len=length).kv_cache_bytes_per_token for length in (4, 32))
    assert whole == 2 * 2 * 2 * 4 * 4, "two layers, keys and values, two heads of four channels, four bytes"
    assert beyond < whole
    assert "an average" in count_cost.__doc__
