"""Prune in several steps, and score again between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.discovery.units import UNITS
from pruner_lib.pruning.ladders import Scores, family_ladder
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.planning import plan_pruning, resolved
from pruner_lib.pruning.selection import Limits
from pruner_lib.pruning.surgery import prune

Score = Callable[[nn.Module, DependencyMap], Scores]
_TARGETS = {"target_params": "params", "target_macs": "macs", "target_bytes": "weight_bytes"}


@dataclass(frozen=True, eq=False)
class PruningStep:
    """One step of :func:`prune_iteratively`.

    Attributes:
        number: 1 for the first.
        steps: how many there are.
        plan: what went in this step, in the groups of the model before it.
        scores: what chose it.
        model: the model after it.
    """

    number: int
    steps: int
    plan: PruningPlan
    scores: Scores
    model: nn.Module

    def __repr__(self) -> str:
        before, after = self.plan.params_before, self.plan.params_after
        return f"PruningStep({self.number} of {self.steps}: {before:,} -> {after:,} parameters)"


def prune_iteratively(
    model: nn.Module,
    score: Score,
    *,
    steps: int = 4,
    between: Callable[[nn.Module], nn.Module] | None = None,
    **planning: Any,
) -> Iterator[PruningStep]:
    """Prune a little, score what is left, prune again.

    Scores describe the model they were taken from; once a quarter of it is gone they are stale. With n steps
    and a ratio r, each family has lost r·k/n of its *dense* groups after step k, rounded as ``plan_pruning``
    rounds; a target is approached in n equal amounts. The last model has exactly the sizes that one step
    would give.

    Example:
        >>> def score(model, dependencies):
        ...     return estimate_importance(model, dependencies, batches)
        >>> for step in prune_iteratively(model, score, ratio=0.5, steps=4, layers=range(4, 27)):
        ...     print(step)
        >>> pruned = step.model

    Args:
        model: left as it is.
        score: makes scores from a model and what ``discover`` found in it.
        steps: how many.
        between: called with the model after every step but the last (a short recovery, for instance);
            what it returns is pruned next.
        **planning: as for :func:`plan_pruning`.

    Yields:
        One step after another; drop the earlier ones to free their models.

    Raises:
        ValueError: fewer than one step; layers by number together with dropped blocks, which would be
            renumbered on the way; and whatever ``plan_pruning`` refuses.
        PruningError: see ``prune``.

    Source: iterative pruning, Molchanov et al. (arXiv 1611.06440), section 2.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    given = (planning.get(name) for name in ("preset", "scope", "kinds", "ranking"))
    chosen = resolved(*given)
    planning |= {"kinds": chosen.kinds}
    planning |= {
        name: planning[name] if isinstance(planning[name], int | str) else tuple(planning[name])
        for name in ("layers", "protect")
        if planning.get(name) is not None
    }
    if "block" in chosen.kinds and (planning.get("layers") is not None or planning.get("protect")):
        raise ValueError(
            "dropping blocks renumbers the layers from step to step, so layers and protect would mean others "
            "in each; leave them out, or drop the blocks in one step with prune_layers"
        )
    by_cost = chosen.scope == "global" or bool(set(chosen.kinds) & set(UNITS))
    dependencies = discover(model)
    scores = score(model, dependencies)
    whole = plan_pruning(dependencies, scores, **planning)  # refuses here what could never be met
    return _steps(model, score, steps, between, _First(dependencies, scores, whole, planning, by_cost))


@dataclass(frozen=True, eq=False)
class _First:
    """What is known of the dense model: its map, its scores, and where one step would end."""

    dependencies: DependencyMap
    scores: Scores
    whole: PruningPlan
    planning: Mapping[str, Any]
    by_cost: bool  # a ratio is approached by parameters, not family by family


def _steps(
    model: nn.Module,
    score: Score,
    steps: int,
    between: Callable[[nn.Module], nn.Module] | None,
    first: _First,
) -> Iterator[PruningStep]:
    current, dependencies, scores = model, first.dependencies, first.scores
    for number in range(1, steps + 1):
        if number > 1:
            current = current if between is None else between(current)
            dependencies = discover(current)
            scores = score(current, dependencies)
        plan = _next_plan(first, dependencies, scores, number / steps)
        current = prune(current, plan)
        yield PruningStep(number, steps, plan, scores, current)


def _next_plan(first: _First, dependencies: DependencyMap, scores: Scores, share: float) -> PruningPlan:
    """The plan of one step: as much as brings ``share`` of the way from the dense model to the end."""
    planning = dict(first.planning)
    for name, measure in _TARGETS.items():
        if planning.get(name) is not None:
            return plan_pruning(dependencies, scores, **planning | {name: _on_the_way(first, share, measure)})
    ratio = planning.pop("ratio")
    if first.by_cost:
        return plan_pruning(
            dependencies, scores, **planning, target_params=_on_the_way(first, share, "params")
        )
    ratios = {kind: r * share for kind, r in ratio.items()} if isinstance(ratio, Mapping) else ratio * share
    wanted = plan_pruning(first.dependencies, first.scores, **planning, ratio=ratios)
    return _down_to(wanted, dependencies, scores)


def _on_the_way(first: _First, share: float, measure: str) -> int:
    """A count between what the dense model costs and what the last one will."""
    if measure == "params":
        dense, end = first.whole.params_before, first.whole.params_after
    else:
        dense, end = (getattr(cost, measure) for cost in (first.whole.dense_cost, first.whole.cost()))
    return dense - round((dense - end) * share)


def _down_to(wanted: PruningPlan, dependencies: DependencyMap, scores: Scores) -> PruningPlan:
    """Remove the lowest-scored groups of each family until it has the sizes of a plan for the dense model."""
    known = {family.name: family for family in dependencies.families}
    removal = {}
    for name, groups in wanted.removal.items():
        dense = wanted.dependencies.family(name)
        family = known.get(name)
        if family is None or _places(family) != _places(dense):
            continue  # one group is left of it, which no longer is a family
        left = (dense.size - len(groups)) // _parts(dense) * _parts(family)
        going = max(family.size - left, 0)
        if going:
            removal[name] = _lowest(family, scores, going)
    return PruningPlan.from_removal(dependencies, removal)


def _places(family: GroupFamily) -> set[tuple[str, int]]:
    """What a family cuts: with one KV head left, its query heads take over the name but not the places."""
    return {(piece.parameter, piece.dim) for piece in family.slices}


def _parts(family: GroupFamily) -> int:
    return 1 if family.partition is None else len(np.unique(family.partition))


def _lowest(family: GroupFamily, scores: Scores, count: int) -> list[int]:
    return family_ladder(family, scores, Limits()).order[:count].tolist()
