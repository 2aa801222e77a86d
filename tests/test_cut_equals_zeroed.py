"""The oracle: cutting any subset of groups gives the logits of the full model with them zeroed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from zoo import NAMES, tiny

from pruner_lib.discovery import GroupFamily, discover
from pruner_lib.pruning import PruningPlan, prune

KINDS = ("mlp_neuron", "attention_head", "query_head", "hidden_channel", "qk_channel", "value_channel", "latent_channel", "expert")
TOLERANCE = dict.fromkeys(("deepseek_v3", "deepseek_v3_groups"), 1e-5)  # its router computes in float32
TOKENS = torch.arange(3, 15).reshape(2, 6)


def random_groups(family: GroupFamily, random: np.random.Generator) -> list[int]:
    """Any groups but all; of query heads the same number in every KV group."""
    if family.partition is None:
        most = family.size - family.at_least
        count = int(random.integers(1, most + 1)) if most > 0 else 0
        return sorted(random.choice(family.size, count, replace=False).tolist())
    parts = [np.flatnonzero(family.partition == part) for part in np.unique(family.partition)]
    most = len(parts[0]) - -(-family.at_least // len(parts))
    count = int(random.integers(1, most + 1)) if most > 0 else 0
    return sorted(int(g) for part in parts for g in random.choice(part, count, replace=False))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


CASES = [(name, kind) for name in NAMES for kind in KINDS]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cut_equals_zeroed(name, kind):
    model = tiny(name)
    dependencies = discover(model)
    families = dependencies.select(kind=kind)
    random = np.random.default_rng(len(name))
    removal = {f.name: groups for f in families if (groups := random_groups(f, random))}
    if not removal:
        blocked = [f.blocked for f in dependencies.select(kind=kind, cuttable=False)]
        assert all(blocked) or kind in ("attention_head", "query_head")
        return
    plan = PruningPlan.from_removal(dependencies, removal)
    cut, zeroed = prune(model, plan), dependencies.zero(model, removal)
    difference = (logits(cut) - logits(zeroed)).abs().max().item()
    assert difference < TOLERANCE.get(name, 1e-9), f"max difference {difference:.2e} after removing {removal}"
    assert (logits(cut) - logits(model)).abs().max() > 1e-6, "the groups removed did not matter"
    assert sum(p.numel() for p in cut.parameters()) == plan.params_after
