"""Cut one kind of families after another, where no way was found to cut them all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from pruner_lib.discovery import discover
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.verification import find_difference

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap, GroupFamily

Place = tuple[str, int]
Rows = dict[Place, frozenset[int]]  # indices of one group, by place


def kinds_in_turn(plan: PruningPlan) -> list[tuple[str, ...]]:
    """Names of the families that a plan cuts, kind by kind in the order of the map; groups of experts
    (families in whose parts the experts lie) are a kind of their own."""
    parts: dict[tuple[str, bool], list[str]] = {}
    for family in plan.dependencies.families:
        if family.name in plan.removal:
            parts.setdefault((family.kind, family.partition is None), []).append(family.name)
    return [tuple(names) for names in parts.values()]


def prune_in_turn(
    model: nn.Module, plan: PruningPlan, cut: Callable[[nn.Module, PruningPlan], nn.Module]
) -> nn.Module:
    """Cut kind by kind: each step looks for few sizes, where all at once would be too many to try together.

    Args:
        model: left as it is; its values are not read.
        plan: cuts families of several kinds.
        cut: ``prune``.

    Raises:
        PruningError: a kind cannot be cut, or what remains is not what the whole plan promised.
    """
    pruned, done = model, PruningPlan.from_removal(plan.dependencies, {})
    for names in kinds_in_turn(plan):
        inputs = plan.dependencies._inputs
        here = plan.dependencies if pruned is model else discover(pruned, example_inputs=inputs)
        removal = _said_in(here, plan, names, done)
        try:
            step = PruningPlan.from_removal(here, removal)
        except ValueError as error:  # blocked by a size that now coincides with another
            before = ", ".join(done.removal)
            raise PruningError(
                f"{error}. This is so once {before} are cut; cut fewer kinds at once"
            ) from error
        if removal:
            pruned = cut(pruned, step)
        done = PruningPlan.from_removal(
            plan.dependencies, {**done.removal, **{name: plan.removal[name] for name in names}}
        )
    problem = find_difference(pruned, plan)
    if problem is not None:
        raise PruningError(f"cut kind by kind, the model is not what the plan promised: {problem}")
    return pruned


def _said_in(
    here: DependencyMap, plan: PruningPlan, names: tuple[str, ...], done: PruningPlan
) -> dict[str, list[int]]:
    """The groups of some families of the plan, found again in the map of a model that was cut since.

    Raises:
        PruningError: a group is not there any more as one.
    """
    known = {
        tuple(sorted((place, tuple(sorted(rows))) for place, rows in group.items())): (family.name, number)
        for family in here.families
        for number, group in enumerate(_groups(family, here))
    }
    removal: dict[str, list[int]] = {}
    for name in names:
        groups = _groups(plan.dependencies.family(name), plan.dependencies)
        for number in plan.removal[name]:
            left = _left(groups[number], done)
            if not left:
                continue  # gone with what was cut before
            key = tuple(sorted((place, tuple(sorted(rows))) for place, rows in left.items()))
            if key not in known:
                raise PruningError(
                    f"group {number} of {name} is no group any more once {', '.join(done.removal)} are cut"
                )
            family, found = known[key]
            removal.setdefault(family, []).append(found)
    return removal


def _groups(family: GroupFamily, dependencies: DependencyMap) -> list[Rows]:
    groups: list[Rows] = [{} for _ in range(family.size)]
    for piece in family.slices:
        place = (dependencies.aliases.get(piece.parameter, piece.parameter), piece.dim)
        for group, rows in zip(groups, piece.index.reshape(family.size, -1).tolist(), strict=True):
            group[place] = group.get(place, frozenset()) | frozenset(rows)
    return groups


def _left(group: Rows, done: PruningPlan) -> Rows:
    """Indices of a group as the cut model counts them."""
    left: Rows = {}
    for (parameter, dim), rows in group.items():
        gone = done.removed_indices(parameter).get(dim, np.zeros(0, dtype=np.int64))
        kept = np.setdiff1d(np.fromiter(rows, dtype=np.int64), gone)
        if len(kept):
            left[parameter, dim] = frozenset((kept - np.searchsorted(gone, kept)).tolist())
    return left
