"""What a plan may touch: kinds, layers, multiples and minimum sizes, checked before anything is planned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from pruner_lib.discovery.families import KINDS, GroupFamily
from pruner_lib.discovery.units import UNITS, layer_numbers

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

Per = int | Mapping[str, int]  # one number for all kinds, or a number per kind


@dataclass(frozen=True)
class Limits:
    """What must hold for the groups that a family keeps.

    Attributes:
        round_to: a multiple of this, in a family that loses any.
        minimum: at least so many.
    """

    round_to: Per = 1
    minimum: Per = 1

    def __post_init__(self) -> None:
        for label, value in (("round_to", self.round_to), ("minimum", self.minimum)):
            if isinstance(value, Mapping):
                known(tuple(value), label)
            for number in value.values() if isinstance(value, Mapping) else (value,):
                if not is_number(number, Integral) or number < 1:
                    raise ValueError(f"{label} must be a whole number of at least 1, not {number!r}")

    def of(self, family: GroupFamily) -> tuple[int, int]:
        """``(step, least)`` of a family; for query heads the step is a multiple of the KV groups too."""
        wanted, least = _of(self.round_to, family.kind), _of(self.minimum, family.kind)
        parts = 1 if family.partition is None else len(np.unique(family.partition))
        step = math.lcm(wanted, parts)
        of = f"{family.name}: it has {family.size} groups" + (f" in {parts} equal parts" if parts > 1 else "")
        _check_size("round_to", wanted, step, family.size, of)
        _check_size("minimum", least, least, family.size, of)
        return step, max(least, family.at_least)  # a router chooses so many experts for every token

    def of_units(self, kind: str, count: int) -> tuple[int, int]:
        """``(step, least)`` of layers dropped whole; a plain ``round_to`` aligns widths and is not theirs."""
        step = self.round_to.get(kind, 1) if isinstance(self.round_to, Mapping) else 1
        least, of = _of(self.minimum, kind), f"{kind!r}: there are {count} such units"
        _check_size("round_to", step, step, count, of)
        _check_size("minimum", least, least, count, of)
        return step, least


def _check_size(label: str, asked: int, needed: int, size: int, of: str) -> None:
    """Refuse a limit that keeps more than there is."""
    if needed > size:
        raise ValueError(
            f"{label} {asked} cannot be met by {of}. Give a number per kind, for example "
            f"{label}={{'mlp_neuron': {asked}}}"
        )


def is_number(value: object, sort: type = Real) -> bool:
    """True for Python's and NumPy's numbers; a text is none."""
    return isinstance(value, sort)


def _of(value: Per, kind: str) -> int:
    return value.get(kind, 1) if isinstance(value, Mapping) else value


def known(kinds: tuple[str, ...], argument: str) -> tuple[str, ...]:
    """The kinds, all of them valid.

    Raises:
        ValueError: an unknown kind, or none.
    """
    unknown = [kind for kind in kinds if kind not in (*KINDS, *UNITS)]
    if unknown or not kinds:
        asked = f"unknown kind {unknown[0]!r} in {argument}" if unknown else f"no kinds given in {argument}"
        raise ValueError(f"{asked}; valid are {', '.join((*KINDS, *UNITS))}")
    return kinds


def chosen_layers(
    dependencies: DependencyMap, layers: int | Iterable[int] | None, protect: int | Iterable[int]
) -> list[int] | None:
    """Layers that may be touched; None for all.

    Raises:
        ValueError: a layer that the model has not or that is no whole number, or none left.
    """
    last = dependencies.num_layers - 1
    wanted = None if layers is None else _numbers("layers", layers)
    spared = _numbers("protect", protect)
    for label, found in (("layers", wanted), ("protect", spared or None)):
        if found is not None and (not found or found[0] < 0 or found[-1] > last):
            asked = f"{found[0]} to {found[-1]}" if found else "none"
            raise ValueError(
                f"{label} {asked} asked for; the model has {dependencies.num_layers} layers, "
                f"counted from 0 to {last}"
            )
    if not spared:
        return wanted
    left = [layer for layer in wanted or range(last + 1) if layer not in spared]
    if not left:
        raise ValueError(f"protect leaves no layer to prune: all of {wanted or f'0 to {last}'} are protected")
    return left


def _numbers(label: str, layers: int | Iterable[int]) -> list[int]:
    """Sorted numbers of layers, each once."""
    try:
        return sorted(set(layer_numbers(layers)))
    except TypeError as error:
        raise ValueError(
            f"{label} are numbers of layers, such as range(4, 27) or [0, 1, 29], not {layers!r}"
        ) from error


def families_of_kind(dependencies: DependencyMap, kind: str, layers: list[int] | None) -> list[GroupFamily]:
    """Cuttable families of a kind in the layers.

    Raises:
        ValueError: there is none; says why, and which kinds can be cut.
    """
    present = [family for family in dependencies.families if family.kind == kind]
    placed = [family for family in present if layers is None or family.layer in layers]
    found = [family for family in placed if family.cuttable]
    if found:
        return found
    cuttable = dict.fromkeys(family.kind for family in dependencies.families if family.cuttable)
    if not present:
        reason = "this model has none"
    elif not placed:
        reason = "none in these layers (families that span layers need layers=None and no protect)"
    else:
        reason = f"it cannot be cut here: {placed[0].blocked}"
    raise ValueError(f"kind {kind!r}: {reason}. Kinds that can be cut in this model: {', '.join(cuttable)}")
