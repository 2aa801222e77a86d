"""Tiny models and data that the tests of recovery share."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 60
QUICK = {
    "max_steps": 6,
    "batch_size": 4,
    "micro_batch": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 1,
    "bf16": False,
}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "initializer_range": 0.2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def counting(rows=8, length=12):
    """Sequences that count upwards: easy to learn."""
    return (torch.arange(length)[None] + torch.arange(rows)[:, None]) % VOCABULARY


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
