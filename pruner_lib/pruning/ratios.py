"""What a plan does to sizes: by which fraction each dimension shrinks, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan


@dataclass(frozen=True)
class Profile:
    """Dimensions that shrink by the same fraction in every layer, so that one size explains them all.

    With one of three KV heads gone from layer 4, ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``
    share the profile that is 2/3 in layer 4 and 1 elsewhere.

    Attributes:
        fractions: kept size over old size, one per layer.
        places: ``(parameter, dim)`` of every dimension that shrinks so.
        sizes: old sizes of those dimensions, and of the families behind them.
        groups: sizes of the families that were cut, the likeliest to be kept as a number somewhere.
    """

    fractions: tuple[Fraction, ...]
    places: frozenset[tuple[str, int]]
    sizes: frozenset[int]
    groups: frozenset[int]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, fraction in enumerate(self.fractions) if fraction != 1)

    def scaled(self, value: int, layer: int) -> int | None:
        """``value`` times the layer's fraction, or None when that is no whole number above 0."""
        new = value * self.fractions[layer]
        return int(new) if new.denominator == 1 and new > 0 else None

    def explains(self, value: int) -> bool:
        """True when a dimension of this profile may be ``value`` times something."""
        return any(size % value == 0 for size in self.sizes)


def layer_of(parameter: str, num_layers: int) -> int | None:
    """The decoder layer in a dotted name: its first number; None outside the layers."""
    for part in parameter.split("."):
        if part.isdigit():
            return int(part) if int(part) < num_layers else None
    return None


def role_of(name: str) -> str:
    """A dotted name with its first number (the layer's) replaced by ``*``."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:position], "*", *parts[position + 1 :]])
    return name


def profiles(plan: PruningPlan, num_layers: int) -> tuple[Profile, ...]:
    """The profiles of a plan.

    Args:
        plan: what is cut.
        num_layers: decoder layers of the model.

    Returns:
        One profile per distinct pattern of fractions, in the order of the plan's parameters.
    """
    num_layers = max(num_layers, 1)  # a module without a list of layers counts as one
    old, new = plan.dependencies.shapes, plan.new_shapes()
    roles: dict[tuple[str, int], dict[int | None, Fraction]] = {}
    places: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for parameter in plan.parameters:
        for dim in plan.removed_indices(parameter):
            role = (role_of(parameter), dim)
            fraction = Fraction(new[parameter][dim], old[parameter][dim])
            roles.setdefault(role, {})[layer_of(parameter, num_layers)] = fraction
            places.setdefault(role, set()).add((parameter, dim))
    merged: dict[tuple[Fraction, ...], set[tuple[str, int]]] = {}
    for role, by_layer in roles.items():
        everywhere = by_layer.get(None, Fraction(1))
        fractions = tuple(by_layer.get(layer, everywhere) for layer in range(num_layers))
        merged.setdefault(fractions, set()).update(places[role])
    groups = _groups(plan)
    of_places = []
    for fractions, found in merged.items():
        behind = frozenset(size for place in found for size in groups.get(place, ()))
        # One fused dimension may hold several families: 128 neurons need not divide its 448 rows.
        sizes = behind | {old[parameter][dim] for parameter, dim in found}
        of_places.append(Profile(fractions, frozenset(found), sizes, behind))
    return (*of_places, *_of_families(plan, num_layers, merged.keys()))


def _of_families(
    plan: PruningPlan, num_layers: int, known: Collection[tuple[Fraction, ...]]
) -> tuple[Profile, ...]:
    """Profiles of families that shrink as none of their dimensions does: 6 of 10 channels of a head."""
    by_kind: dict[tuple[str, int], list[str]] = {}
    families = {family.name: family for family in plan.dependencies.families}
    for name in plan.removal:
        by_kind.setdefault((families[name].kind, families[name].size), []).append(name)
    found = []
    for (_, size), names in by_kind.items():
        kept = {families[name].layer: Fraction(plan.kept_sizes[name], size) for name in names}
        everywhere = kept.get(None, Fraction(1))
        fractions = tuple(kept.get(layer, everywhere) for layer in range(num_layers))
        places = frozenset((piece.parameter, piece.dim) for name in names for piece in families[name].slices)
        if fractions not in known:
            found.append(Profile(fractions, places, frozenset({size}), frozenset({size})))
    return tuple(found)


def _groups(plan: PruningPlan) -> Mapping[tuple[str, int], set[int]]:
    """Sizes of all families by the places they touch."""
    sizes: dict[tuple[str, int], set[int]] = {}
    for family in plan.dependencies.families:
        for piece in family.slices:
            sizes.setdefault((piece.parameter, piece.dim), set()).add(family.size)
    return sizes
