"""What a removal must satisfy before it may become a plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pruner_lib.discovery.families import GroupFamily, Removal, UnknownFamilyError, group_numbers

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap


def checked_removal(dependencies: DependencyMap, removal: Removal) -> dict[str, tuple[int, ...]]:
    """Sorted, de-duplicated, non-empty removal in the order of the map's families.

    Raises:
        UnknownFamilyError: a family name that the map does not hold (near names are listed).
        ValueError: a blocked family, a group that does not exist, every group of a family, or
            query heads removed unevenly from the KV groups.
    """
    families = {family.name: family for family in dependencies.families}
    for name in removal:
        if name not in families:
            raise UnknownFamilyError(_unknown_family(name, families))
    checked = {
        name: groups
        for name, family in families.items()
        if name in removal and (groups := _checked_groups(family, removal[name]))
    }
    for name in checked:
        _check_parts(families[name], checked, families)
    return checked


def _unknown_family(name: str, families: Mapping[str, GroupFamily]) -> str:
    near = difflib.get_close_matches(str(name), families, n=3, cutoff=0.5) or list(families)[:3]
    return f"no family {name!r} in this model ({len(families)} families); near names: {', '.join(near)}"


def _checked_groups(family: GroupFamily, groups: Iterable[int]) -> tuple[int, ...]:
    indices = group_numbers(family, groups)
    if not indices:
        return ()
    if family.blocked is not None:
        raise ValueError(f"{family.name} cannot be cut: {family.blocked}. Leave it out of the plan")
    if family.size - len(indices) < family.at_least > 1:
        raise ValueError(
            f"{family.name}: {family.size - len(indices)} of {family.size} groups would stay, but the router "
            f"chooses {family.at_least} for every token; remove at most {family.size - family.at_least}"
        )
    if len(indices) == family.size:
        raise ValueError(
            f"{family.name}: all {family.size} groups would go; at least one must stay. "
            "To drop a whole layer use prune_layers"
        )
    return tuple(indices)


def _check_parts(
    family: GroupFamily, checked: Mapping[str, tuple[int, ...]], families: Mapping[str, GroupFamily]
) -> None:
    """Every KV group that stays must keep the same number of query heads, and at least one."""
    if family.partition is None:
        return
    parts, sizes = np.unique(family.partition, return_counts=True)
    removed = np.bincount(
        np.searchsorted(parts, family.partition[list(checked[family.name])]), minlength=len(parts)
    )
    stays = ~np.isin(parts, _removed_parts(family, checked, families))
    kept = (sizes - removed)[stays]
    if len(set(kept.tolist())) > 1 or (kept == 0).any():
        counts = zip(parts[stays].tolist(), kept.tolist(), strict=True)
        listed = ", ".join(f"{part}: {left}" for part, left in counts)
        raise ValueError(
            f"{family.name}: every {'KV group' if family.kind == 'query_head' else 'part'} must keep the "
            f"same number of {family.kind.replace('_', ' ')}s, at least one; "
            f"this removal leaves {{{listed}}}. Remove as many from each"
        )


def _removed_parts(
    family: GroupFamily, checked: Mapping[str, tuple[int, ...]], families: Mapping[str, GroupFamily]
) -> tuple[int, ...]:
    """KV groups that the same removal takes away whole, with all their query heads."""
    for name, groups in checked.items():
        other = families[name]
        whole = {"query_head": "attention_head"}.get(family.kind, family.kind)
        if other.partition is None and other.kind == whole and other.layer == family.layer:
            return groups
    return ()
