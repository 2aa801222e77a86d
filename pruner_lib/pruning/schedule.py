"""Prune in several steps, and score again between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.discovery.families import whole_number
from pruner_lib.discovery.units import UNITS
from pruner_lib.pruning.budgets import Budget, Search
from pruner_lib.pruning.compensation import Compensation
from pruner_lib.pruning.compensation.compensate import as_settings
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.ladders import Ladder, Scores, columns_of, depth_ladder, family_ladder
from pruner_lib.pruning.lineage import Lineage
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.planning import ladders_of, plan_pruning, resolved, solved
from pruner_lib.pruning.presets import Preset
from pruner_lib.pruning.selection import Limits, chosen_layers
from pruner_lib.pruning.surgery import prune

Score = Callable[[nn.Module, DependencyMap], Scores]


@dataclass(frozen=True, eq=False)
class PruningStep:
    """One step of :func:`prune_iteratively`.

    Attributes:
        number: 1 for the first.
        steps: how many there are.
        plan: what went in this step, in the groups of the model before it.
        scores: what chose it.
        model: the model after it.
        total: what went in this step and before, in the groups of the dense model: ``prune(dense, total)``
            has the sizes of ``model``, and where nothing was done to it between the steps its weights;
            ``save_pruned`` takes it.
    """

    number: int
    steps: int
    plan: PruningPlan
    scores: Scores
    model: nn.Module
    total: PruningPlan

    def __repr__(self) -> str:
        before, after = self.plan.params_before, self.plan.params_after
        return f"PruningStep({self.number} of {self.steps}: {before:,} -> {after:,} parameters)"


def prune_iteratively(
    model: nn.Module,
    score: Score,
    *,
    steps: int = 4,
    between: Callable[[nn.Module], nn.Module] | None = None,
    compensate: Compensation | Tensor | None = None,
    **planning: Any,
) -> Iterator[PruningStep]:
    """Prune a little, score what is left, prune again.

    Scores describe the model they were taken from; once a quarter of it is gone they are stale. With n steps
    and a ratio r in the local scope, each family has lost r·k/n of its *dense* groups after step k, rounded
    as ``plan_pruning`` rounds, and the last model has exactly the sizes that one step would give.

    A target, a ratio in the global scope, and one of layers dropped whole are approached in n equal amounts:
    of the measure of the target, else of parameters. Every step meets its goal as closely as ``plan_pruning``
    meets a target, but the new scores choose, so families may end at other sizes than in one step; and what
    an earlier step took is gone, so that a layer dropped late may leave less than in one step. Floors,
    ``minimum`` and ``round_to`` mean the dense model's sizes in every step. Where one step went past the goal
    of the next, as a dropped layer may, the next plan is empty.

    With ``compensate``, each step cuts the *dense* model by all that has been chosen so far and fits its
    readers to the dense model's outputs, as ``prune(…, compensate=…)`` does; so what the fit makes up for
    counts when the rest is chosen, and no error of an earlier fit stays.

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
        compensate: calibration token ids ``[N, L]`` or :class:`Compensation`: the readers are fitted again in
            closed form after every step, the last one too.
        **planning: as for :func:`plan_pruning`.

    Yields:
        One step after another; drop the earlier ones to free their models.

    Raises:
        ValueError: fewer than one step; both ``between`` and ``compensate``; layers by number together with
            dropped blocks, which would be renumbered on the way; whatever ``plan_pruning`` refuses; and, from
            a later step, a model made by ``between`` whose parameters have other names or sizes.
        TypeError: something else to compensate with.
        PruningError: see ``prune``.

    Source: iterative pruning, Molchanov et al. (arXiv 1611.06440), section 2.
    """
    if whole_number(steps) is None or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
    if between is not None and compensate is not None:
        raise ValueError(
            "give between or compensate: a compensated step begins from the dense model again, and what "
            "between did to the last one would be lost. Train the last step's model instead"
        )
    settings = None if compensate is None else as_settings(compensate)
    given = (planning.get(name) for name in ("preset", "scope", "kinds", "ranking"))
    chosen = resolved(*given)
    planning |= {"kinds": chosen.kinds}
    planning |= {name: _read_once(planning[name]) for name in ("layers", "protect") if name in planning}
    if "block" in chosen.kinds and (planning.get("layers") is not None or planning.get("protect", ()) != ()):
        raise ValueError(
            "dropping blocks renumbers the layers from step to step, so layers and protect would mean others "
            "in each; leave them out, or drop the blocks in one step with prune_layers"
        )
    dependencies = discover(model)
    scores = score(model, dependencies)
    plan_pruning(dependencies, scores, **planning)  # refuses here what could never be met
    first = _First.of(dependencies, scores, chosen, planning)
    return _steps(model, score, steps, between, settings, first)


@dataclass(frozen=True, eq=False)
class _First:
    """What is known of the dense model, and where one step would end."""

    dependencies: DependencyMap
    scores: Scores
    chosen: Preset
    planning: Mapping[str, Any]
    ladders: list[Ladder]  # what may go, and how far, in the dense model's sizes
    measure: str  # of the target; a ratio is approached by parameters where it is not met family by family
    dense: int
    target: int

    @classmethod
    def of(
        cls, dependencies: DependencyMap, scores: Scores, chosen: Preset, planning: Mapping[str, Any]
    ) -> _First:
        budget = Budget.of(
            planning.get("ratio"),
            params=planning.get("target_params"),
            macs=planning.get("target_macs"),
            weight_bytes=planning.get("target_bytes"),
        )
        layers = chosen_layers(dependencies, planning.get("layers"), planning.get("protect", ()))
        limits = Limits(planning.get("round_to", 1), planning.get("minimum", 1))
        ladders = ladders_of(dependencies, scores, chosen, layers, limits)
        search = Search(dependencies, columns_of(ladders, uniform=planning.get("uniform", False)), budget)
        return cls(
            dependencies, scores, chosen, planning, ladders, budget.measure, search.dense, search.target
        )

    @property
    def by_family(self) -> bool:
        """True where every family approaches its own size."""
        local = self.chosen.scope == "local" and not set(self.chosen.kinds) & set(UNITS)
        return local and self.planning.get("ratio") is not None


def _steps(
    model: nn.Module,
    score: Score,
    steps: int,
    between: Callable[[nn.Module], nn.Module] | None,
    settings: Compensation | None,
    first: _First,
) -> Iterator[PruningStep]:
    current, dependencies, scores = model, first.dependencies, first.scores
    lineage = Lineage.of(dependencies)
    for number in range(1, steps + 1):
        if number > 1:
            current = current if between is None else _still_the_same(current, between(current))
            dependencies = discover(current)
            scores = score(current, dependencies)
        plan = _next_plan(first, lineage, dependencies, scores, number / steps)
        lineage = lineage.after(plan)
        total = _agreeing(lineage.total(first.chosen.kinds), plan)
        current = prune(current, plan) if settings is None else prune(model, total, compensate=settings)
        yield PruningStep(number, steps, plan, scores, current, total)


def _agreeing(total: PruningPlan, last: PruningPlan) -> PruningPlan:
    """``total``, the plan for the dense model; refuses one that would not end where the last step does."""
    if total.params_after != last.params_after:
        raise PruningError(
            f"the steps so far leave {last.params_after:,} parameters, the same cuts at once would leave "
            f"{total.params_after:,}: what went could not be followed back to the dense model. Prune it in "
            "one step with plan_pruning and prune"
        )
    return total


def _still_the_same(given: nn.Module, returned: nn.Module) -> nn.Module:
    """What ``between`` returned; refuses a model in which what was pruned would not be found again."""
    found = {name: tuple(p.shape) for name, p in returned.named_parameters(remove_duplicate=False)}
    for name, parameter in given.named_parameters():
        if found.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"between was given a model whose {name} is {list(parameter.shape)}; in the model it "
                f"returned it is {list(found[name]) if name in found else 'not there'}. Return the model "
                "that was given, trained as you like, with the names and sizes of its parameters (adapters "
                "merged)"
            )
    return returned


def _next_plan(
    first: _First, lineage: Lineage, dependencies: DependencyMap, scores: Scores, share: float
) -> PruningPlan:
    """The plan of one step: as much as brings ``share`` of the way from the dense model to the end."""
    families = lineage.families(dependencies)
    if first.by_family:
        ratio = first.planning["ratio"]
        part = {kind: r * share for kind, r in ratio.items()} if isinstance(ratio, Mapping) else ratio * share
        wanted = plan_pruning(first.dependencies, first.scores, **{**first.planning, "ratio": part})
        return _down_to(wanted, families, dependencies, scores)
    ladders = _ladders_left(first, lineage, families, dependencies, scores)
    goal = first.dense - round((first.dense - first.target) * share)
    columns = columns_of(ladders, uniform=first.planning.get("uniform", False))
    search = Search(dependencies, columns, Budget(measure=first.measure, target=goal))
    if search.dense <= goal:  # the step before went past it, by a whole layer where half of one was asked
        return PruningPlan.from_removal(dependencies, {})
    return solved(search, first.chosen)


def _down_to(
    wanted: PruningPlan,
    families: Mapping[str, GroupFamily],
    dependencies: DependencyMap,
    scores: Scores,
) -> PruningPlan:
    """Remove the lowest-scored groups of each family until it has the sizes of a plan for the dense model."""
    removal = {}
    for name, groups in wanted.removal.items():
        if name not in families:
            continue  # one group is left of it, which no longer is a family
        dense, family = wanted.dependencies.family(name), families[name]
        left = (dense.size - len(groups)) // _parts(dense) * _parts(family)
        going = max(family.size - left, 0)
        if going:
            removal[family.name] = family_ladder(family, scores, Limits()).order[:going].tolist()
    return PruningPlan.from_removal(dependencies, removal)


def _ladders_left(
    first: _First,
    lineage: Lineage,
    families: Mapping[str, GroupFamily],
    dependencies: DependencyMap,
    scores: Scores,
) -> list[Ladder]:
    """What may still go, down to the sizes at which it ends in the dense model."""
    units = lineage.units(dependencies)
    ladders = []
    for dense in first.ladders:
        if dense.units:
            left = [units[unit] for unit in dense.units if unit in units]
            if left:
                ladder = depth_ladder(dense.kind, left, scores, Limits())
                ladders.append(replace(ladder, step=dense.step, least=dense.lowest))
        elif dense.name in families and families[dense.name].cuttable:
            family = families[dense.name]
            whole, now = _parts(first.dependencies.family(dense.name)), _parts(family)
            ladder = family_ladder(family, scores, Limits())
            step, least = dense.step // whole * now, dense.lowest // whole * now
            ladders.append(replace(ladder, kind=dense.kind, step=step, least=least))
    return ladders


def _read_once(layers: Any) -> Any:
    """What may be read in every step, of an iterator too."""
    number = whole_number(layers)
    if number is not None:
        return number
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers


def _parts(family: GroupFamily) -> int:
    return 1 if family.partition is None else len(np.unique(family.partition))
