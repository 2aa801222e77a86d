"""The cut's self-check: discovery on the cut model must find what the plan left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from pruner_lib.pruning.alike import StandIns, by_layer, stand_ins

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap, GroupFamily
    from pruner_lib.pruning.plan import PruningPlan

Place = tuple[str, int]
Tables = dict[Place, np.ndarray]  # rows are groups, ordered alike in all tables of a family


def find_difference(model: nn.Module, plan: PruningPlan) -> str | None:
    """What discovery finds in a cut model against what the plan promised.

    Every family of the plan's map that keeps two groups or more must be found again: the same
    indices of the same parameters together, counted after the cut. Names do not matter, since they
    change in small models (with one KV head left, its query heads are ordinary heads).

    Args:
        model: the cut model; its values are not read, the meta device is best.
        plan: what was cut.

    Returns:
        The first difference in words, or None when there is none.
    """
    promised = {
        family.name: tables
        for family in plan.dependencies.families
        if len(next(iter((tables := _remaining(family, plan)).values()), ())) > 1
    }
    factors = plan.dependencies.factors
    short = stand_ins(model, by_layer(model, _facts(plan, promised)))
    if short is not None:
        kept = {name: _renamed(tables, short) for name, tables in promised.items()}
        renamed = [(short.renamed(module), *rest) for module, *rest in factors]
        numbers = {number for number in renamed if number[0] is not None}
        if _difference(short.model, kept, numbers, plan) is None:
            return None
    return _difference(model, promised, set(factors), plan)


def _facts(plan: PruningPlan, promised: Mapping[str, Tables]) -> Iterator[tuple[str, Any]]:
    """What the dense model's discovery knows and the plan promises, parameter by parameter."""
    for family in plan.dependencies.families:
        role = family.name if family.layer is None else (family.kind, family.blocked)
        for (parameter, dim), rows in promised.get(family.name, {}).items():
            yield parameter, (role, dim, rows.shape, rows.tobytes())
    for module, *rest in plan.dependencies.factors:
        yield module, tuple(rest)


def _renamed(tables: Tables, short: StandIns) -> Tables:
    """Tables of the places that the short model has, under its names."""
    names = {old: short.renamed(old) for old, _ in tables}
    left: Tables = {}
    for (old, dim), rows in tables.items():
        name = names[old]
        if name is not None:
            left[name, dim] = rows
    return _ordered(left, next(iter(left))) if left else {}


def _difference(
    model: nn.Module, promised: Mapping[str, Tables], factors: set[Any], plan: PruningPlan
) -> str | None:
    from pruner_lib.discovery import DiscoveryError, discover

    try:
        found = discover(model, example_inputs=plan.dependencies._inputs)
    except DiscoveryError as error:
        return f"it does not run ({' '.join(str(error.__cause__ or error).split())[:200]})"
    moved = _moved(factors, found)
    if moved is not None:
        return f"a number in its code moved with the cut ({moved})"
    by_place = _by_place(found)
    for name, expected in promised.items():
        if expected and not _is_found(expected, by_place):
            place, rows = next(iter(expected.items()))
            sizes = sorted({len(tables[place]) for tables in by_place.get(place, [])})
            return (
                f"{name} should keep {len(rows)} groups of {rows.shape[1]} indices in {place[0]}, "
                f"discovery finds {sizes or 'no'} groups there"
            )
    return None


def changed_numbers(model: nn.Module, dependencies: DependencyMap) -> str | None:
    """What differs between the numbers in a model's code and those that were discovered; None for nothing."""
    from pruner_lib.discovery import DiscoveryError, discover

    try:
        found = discover(model, example_inputs=dependencies._inputs)
    except DiscoveryError as error:
        return f"it does not run ({error})"
    return _moved(set(dependencies.factors), found)


def _moved(factors: set[Any], found: DependencyMap) -> str | None:
    """The first number that only one of both has, in words."""
    moved = factors ^ set(found.factors)
    if not moved:
        return None
    module, operator, number = sorted(moved)[0]
    return f"{operator} with {number:.6g} in {module or 'the model'}"


def _is_found(expected: Tables, by_place: Mapping[Place, list[Tables]]) -> bool:
    first = next(iter(expected))
    return any(
        all(place in tables and _is_within(rows, tables[place]) for place, rows in expected.items())
        or _are_among(expected, tables, first)
        for tables in (_ordered(tables, first) for tables in by_place.get(first, []))
    )


def _are_among(expected: Tables, found: Tables, first: Place) -> bool:
    """True when the expected groups are some of those found, slice by slice.

    The others belong to a family of their own in the dense model, and are looked for as that: with one
    query row left beside the key's and the value's of a fused projection, all three are alike.
    """
    rows, anchors = expected[first], found[first][:, 0]
    at = np.minimum(np.searchsorted(anchors, rows[:, 0]), len(anchors) - 1)
    return all(
        place in found
        and found[place].shape[1] == wanted.shape[1]
        and np.array_equal(found[place][at], wanted)
        for place, wanted in expected.items()
    )


def _is_within(rows: np.ndarray, found: np.ndarray) -> bool:
    """True when group by group the expected indices go together in the cut model.

    A group may have gained some: with one query head left per KV head, the two are one group.
    """
    if len(rows) != len(found):
        return False
    if rows.shape == found.shape:
        return np.array_equal(rows, found)
    return all(np.isin(row, other).all() for row, other in zip(rows, found, strict=True))


def _by_place(dependencies: DependencyMap) -> dict[Place, list[Tables]]:
    families: dict[Place, list[Tables]] = {}
    for family in dependencies.families:
        tables = _merged(family, {})
        for place in tables:
            families.setdefault(place, []).append(tables)
    return families


def _merged(family: GroupFamily, aliases: Mapping[str, str]) -> Tables:
    """One table per place: all indices of each group, sorted."""
    pieces: dict[Place, list[np.ndarray]] = {}
    for piece in family.slices:
        place = (aliases.get(piece.parameter, piece.parameter), piece.dim)
        pieces.setdefault(place, []).append(piece.index.reshape(family.size, -1))
    return {place: np.sort(np.concatenate(found, axis=1), axis=1) for place, found in pieces.items()}


def _remaining(family: GroupFamily, plan: PruningPlan) -> Tables:
    """What the plan leaves of a family, in indices of the cut model."""
    tables = _merged(family, plan.dependencies.aliases)
    moved: dict[Place, tuple[np.ndarray, np.ndarray]] = {}  # new index of each entry, and whether it stays
    for (parameter, dim), rows in tables.items():
        size = plan.dependencies.shapes[parameter][dim]
        stays = np.ones(size, dtype=bool)
        stays[plan.removed_indices(parameter).get(dim, np.zeros(0, dtype=np.int64))] = False
        moved[parameter, dim] = (np.cumsum(stays) - 1)[rows], stays[rows]
    alive = np.logical_or.reduce([kept.any(axis=1) for _, kept in moved.values()])
    survivors: Tables = {}
    for place, (index, kept) in moved.items():
        widths = np.unique(kept[alive].sum(axis=1))
        if len(widths) == 1 and widths[0]:
            survivors[place] = index[alive][kept[alive]].reshape(-1, widths[0])
    return _ordered(survivors, next(iter(survivors))) if survivors else {}


def _ordered(tables: Tables, first: Place) -> Tables:
    """Groups in the order of their smallest index at one place."""
    order = np.argsort(tables[first][:, 0], kind="stable")
    return {place: rows[order] for place, rows in tables.items()}
