"""Plans that cut several kinds at once: joint where one configuration says it, else kind by kind."""

from __future__ import annotations

import numpy as np
import pytest
from test_cut_equals_zeroed import logits, random_removal
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningError, PruningPlan, configuration, prune, surgery
from pruner_lib.pruning import attributes as attribute_search


@pytest.mark.parametrize("name", ["phi3", "stablelm", "gpt_bigcode"])
def test_all_kinds_at_once_equal_zeroing_them(name):
    model = tiny(name)
    dependencies = discover(model)
    random = np.random.default_rng(0)
    removal: dict[str, list[int]] = {}
    for kind in sorted({family.kind for family in dependencies.select()}):
        removal.update(random_removal(dependencies, kind, random, even=True))
    plan = PruningPlan.from_removal(dependencies, removal)
    assert len({dependencies.family(family).kind for family in plan.removal}) > 2
    cut = prune(model, plan)
    assert (logits(cut) - logits(dependencies.zero(model, removal))).abs().max() < 1e-9
    assert sum(p.numel() for p in cut.parameters()) == plan.params_after


def test_the_search_goes_on_where_shapes_do_not_tell():
    """One of two groups of experts: three experts in two groups have the same shapes, and do not run."""
    model = tiny("deepseek_v3_groups")
    dependencies = discover(model)
    groups = next(f for f in dependencies.select(kind="expert") if f.partition is None)
    removal = {groups.name: [1]}
    cut = prune(model, PruningPlan.from_removal(dependencies, removal))
    experts, sorted_into = (
        cut.model.layers[1].mlp.gate.weight.shape[0],
        cut.config.per_layer_config[1].n_group,
    )
    assert (experts, sorted_into) == (3, 1)
    assert (logits(cut) - logits(dependencies.zero(model, removal))).abs().max() < 1e-5


def test_a_search_that_finds_nothing_is_bounded_and_says_how_far_it_went(monkeypatch):
    checks = []
    monkeypatch.setattr(surgery, "find_difference", lambda *given: checks.append(given) or "it is not right")
    model = tiny("stablelm")
    plan = PruningPlan.from_removal(discover(model), {"layers.0.attention_head": [0]})
    with pytest.raises(PruningError, match=r"Tried \d+ ways .* it is not right"):
        prune(model, plan)
    assert 1 < len(checks) <= attribute_search._MAX_TRIES + configuration._MAX_REFUSALS
