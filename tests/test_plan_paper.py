"""The paper's table of costs, from configurations alone: nothing here ever holds a weight."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.evaluation import count_cost
from pruner_lib.pruning import plan_pruning, prune

LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False}  # fmt: skip
LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip


def on_meta(settings):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**settings)).half()


def with_scores(settings):
    dependencies = discover(on_meta(settings))
    return dependencies, {family.name: torch.arange(family.size) for family in dependencies.families}


@pytest.fixture(scope="module")
def llama_7b():
    return with_scores(LLAMA_7B)


BLOCK_20 = {"ratio": 0.25, "layers": range(4, 30)}
BLOCK_50 = {"ratio": 0.6, "layers": range(3, 31)}


@pytest.mark.parametrize(
    ("options", "params", "macs", "mebibytes"),
    [
        ({"ratio": 0}, 6.74e9, 424.02e9, 12884.5),
        (BLOCK_20, 5_422_977_024, 339.60e9, 10375.5),
        (BLOCK_50, 3.35e9, 206.59e9, 6533.9),
        ({"ratio": 0.2, "kinds": "hidden_channel"}, 5.39e9, 339.36e9, 10363.6),
        ({"ratio": 0.5, "kinds": "hidden_channel"}, 3.37e9, 212.58e9, 6556.3),
    ],
    ids=["dense", "block 20 %", "block 50 %", "channel 20 %", "channel 50 %"],
)
def test_llama_7b(llama_7b, options, params, macs, mebibytes):
    """Table 3 of arXiv 2305.11627: parameters to the printed digits, multiply-accumulates within 0.5 %.

    Its memory is what a GPU reports, so it is weights and a little more.
    """
    cost = plan_pruning(*llama_7b, **options).cost(batch_size=1, seq_len=64)
    assert cost.params == params or round(cost.params / 1e9, 2) == pytest.approx(params / 1e9, abs=1e-9)
    assert cost.macs == pytest.approx(macs, rel=0.005)
    assert cost.weight_bytes / 2**20 == pytest.approx(mebibytes, rel=0.025)


def test_block_20_percent_exactly(llama_7b):
    plan = plan_pruning(*llama_7b, **BLOCK_20)
    assert (plan.params_before, plan.params_after) == (6_738_415_616, 5_422_977_024)
    assert plan.cost().params == 5_422_977_024


def test_block_50_percent_exactly(llama_7b):
    """28 layers keep 13 of 32 heads and 4403 of 11008 neurons."""
    left = 4 * 4096 * 13 * 128 + 3 * 4096 * 4403
    whole = 4 * 4096**2 + 3 * 4096 * 11008
    expected = 28 * left + 4 * whole + 65 * 4096 + 2 * 32000 * 4096
    assert plan_pruning(*llama_7b, **BLOCK_50).params_after == expected


def test_llama_3_8b_exactly():
    assert plan_pruning(*with_scores(LLAMA_3_8B), **BLOCK_20).params_after == 6_612_586_496


@pytest.mark.slow
def test_the_cut_model_counts_the_same(llama_7b):
    plan = plan_pruning(*llama_7b, **BLOCK_20)
    assert vars(count_cost(prune(on_meta(LLAMA_7B), plan))) == vars(plan.cost())
