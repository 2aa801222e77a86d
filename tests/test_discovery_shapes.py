"""Sizes that coincide, and both ways of attention: the families stay, and cut equals zeroed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import can_lose
from test_cut_equals_zeroed import KINDS, random_removal
from transformers import AutoConfig, AutoModelForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, prune

# width, KV heads, query heads, channels per head, layers, neurons, tokens: what coincides is told by the name
SHAPES = {
    "two channels per head, five of everything else": (20, 2, 4, 2, 1, 5, 5),
    "one head as wide as the model": (12, 1, 1, 12, 1, 12, 4),
    "heads as many as channels, tokens as many as both": (16, 4, 4, 4, 2, 16, 4),
    "layers as many as heads and neurons": (20, 5, 5, 4, 5, 5, 5),
    "one KV head": (8, 1, 4, 2, 2, 8, 2),
    "three queries per KV head, three layers": (27, 3, 9, 8, 3, 9, 3),
    "tokens as many as the width": (30, 5, 5, 6, 1, 30, 30),
}


def made(kind: str, shape: tuple[int, ...], attention: str) -> torch.nn.Module:
    width, kv, heads, size, layers, neurons, _ = shape
    in_turn = {"layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]}
    config = AutoConfig.for_model(
        kind,
        vocab_size=23,
        hidden_size=width,
        num_key_value_heads=kv,
        num_attention_heads=heads,
        head_dim=size,
        num_hidden_layers=layers,
        intermediate_size=neurons,
        max_position_embeddings=64,
        pad_token_id=0,
        sliding_window=3,  # fewer than the tokens of all shapes but two
        **(in_turn if kind == "gemma3_text" else {}),
    )
    torch.manual_seed(0)
    options = {"attn_implementation": attention, "dtype": torch.float64}
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model


# Gemma 3: sliding and full attention, in turn. Each shape in one of the two; in the other it is slow.
PAIRS = [
    pytest.param(kind, name, marks=[] if (number + turn) % 2 else [pytest.mark.slow])
    for turn, kind in enumerate(("qwen3", "gemma3_text"))
    for number, name in enumerate(SHAPES)
]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_coinciding_sizes(kind, name):
    shape = SHAPES[name]
    if kind == "gemma3_text" and shape[0] % shape[2]:
        shape = (shape[2] * 3, *shape[1:])
    model, eager = made(kind, shape, "sdpa"), made(kind, shape, "eager")
    dependencies = discover(model)
    told = [(f.name, f.size, f.blocked is None) for f in dependencies.families]
    assert [(f.name, f.size, f.blocked is None) for f in discover(eager).families] == told
    ids = torch.randint(3, 23, (2, shape[-1]), generator=torch.Generator().manual_seed(0))
    random = np.random.default_rng(len(name))
    for part in KINDS:
        if not any(can_lose(f) for f in dependencies.select(kind=part)):
            continue
        removal = random_removal(dependencies, part, random)
        cut = prune(model, PruningPlan.from_removal(dependencies, removal))
        with torch.no_grad():
            difference = cut(ids).logits - dependencies.zero(model, removal)(ids).logits
        assert difference.abs().max() < 1e-9, f"{part}: {removal}"


def test_capped_scores_and_logits_change_no_family():
    shape = SHAPES["three queries per KV head, three layers"]
    plain = made("gemma2", shape, "eager")
    plain.config.attn_logit_softcapping = plain.config.final_logit_softcapping = None
    capped = made("gemma2", shape, "eager")
    assert capped.config.attn_logit_softcapping and capped.config.final_logit_softcapping
    names = [(f.name, f.size, f.blocked is None) for f in discover(capped).families]
    assert names == [(f.name, f.size, f.blocked is None) for f in discover(plain).families]
