"""Decoders that exist nowhere: every family is cut as it is zeroed, or blocked, or its cut is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import can_lose
from odd_decoders import LAYERS, odd
from test_cut_equals_zeroed import random_groups

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningError, PruningPlan, prune

FREE = {  # what may be cut besides the residual width
    **dict.fromkeys(("Attention", "TiedQueryKey", "GatedHeads", "PairedKeyValue"), "attention_head"),
    "LearnedSlopes": "attention_head",
    **dict.fromkeys(("Neurons", "OverTheirNorm", "OverTheLargestToken", "Shifted", "Halved", "Recurrent")),
}
BLOCKED = {
    "ComputedSlopes": ("q.weight", "fixes for each index"),
    "OverTheirLargest": ("up.weight", "compete or have an order"),
    "OverTheLargestOfAll": ("up.weight", "compete or have an order"),
    "Convolved": ("up.weight", "no rule for the operator convolution"),
    "Reversed": ("up.weight", "moved by a fixed amount"),
}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 13).reshape(2, 5))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_odd_decoders_are_cut_as_they_are_zeroed(name, shared):
    model = odd(name, shared=shared)
    dependencies = discover(model)
    random = np.random.default_rng(len(name))
    cut_kinds = set()
    for family in dependencies.select():
        if not can_lose(family):
            continue
        removal = {family.name: random_groups(family, random)}
        try:
            cut = prune(model, PruningPlan.from_removal(dependencies, removal))
        except PruningError:
            continue
        cut_kinds.add(family.kind)
        difference = logits(cut) - logits(dependencies.zero(model, removal))
        assert difference.abs().max() < 1e-9, removal
    assert "hidden_channel" in cut_kinds
    if name in FREE:
        assert (FREE[name] or "mlp_neuron") in cut_kinds or "latent_channel" in cut_kinds, cut_kinds


@pytest.mark.parametrize("name", BLOCKED)
def test_what_the_code_ties_is_blocked_with_the_reason(name):
    weight, reason = BLOCKED[name]
    families = [
        family
        for family in discover(odd(name)).families
        if any(s.parameter == f"layers.0.{weight}" and s.dim == 0 for s in family.slices)
    ]
    assert families
    assert any(reason in (family.blocked or "") for family in families), [f.blocked for f in families]
    assert not any(family.cuttable and family.kind == "attention_head" for family in families)
