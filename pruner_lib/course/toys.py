"""Small random models for checks: right or wrong shows on them as well, and in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def tiny_llama(*, layers: int = 2, heads: int = 4, kv_heads: int = 2, neurons: int = 12) -> nn.Module:
    """A Llama of random weights, 8 channels a head, the same at every call.

    Args:
        layers: decoder layers.
        heads: query heads; the residual width is eight times as large.
        kv_heads: key-value heads.
        neurons: of each MLP.
    """
    return tiny_model(
        "llama",
        hidden_size=8 * heads,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32,
        tie_word_embeddings=False,
    )


def tiny_model(architecture: str, **sizes: Any) -> nn.Module:
    """A model of transformers' own class with random weights; no random state outside is touched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Some configurations name an end token far beyond a small vocabulary, and say so on standard error.
    sizes = {"bos_token_id": 0, "eos_token_id": 1, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    return model.eval()
