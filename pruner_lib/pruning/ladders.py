"""The order in which families lose their groups, and the numbers they may lose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.importance.scores import ImportanceScores

if TYPE_CHECKING:
    from pruner_lib.pruning.selection import Limits

Scores = ImportanceScores | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Ladder:
    """The order in which a family loses its groups, or a model its layers.

    Example: 22 neurons of which a multiple of 8 must stay (``step``) may lose 6 or 14.

    Attributes:
        name: the family's, or the kind of unit (``block``, ``attention``, ``mlp``).
        kind: of one group.
        size: number of groups.
        order: group indices, the first to go first; for query heads, one of each KV group in turn.
        scores: of each in that order.
        step: the kept number is a multiple of this.
        least: the fewest that may stay.
        floor: the fewest that one ranking may leave; a ratio does not know it.
        units: names of the units, for a ladder of layers; empty for a family.
    """

    name: str
    kind: str
    size: int
    order: np.ndarray
    scores: np.ndarray
    step: int = 1
    least: int = 1
    floor: int = 1
    units: tuple[str, ...] = ()

    @property
    def most(self) -> int:
        """Largest number of groups that may go."""
        return self.size - self.lowest

    @property
    def lowest(self) -> int:
        """The fewest groups that may stay, step and floor considered."""
        return self._in_steps(max(self.least, self.floor))

    def _in_steps(self, least: int) -> int:
        return min(self.size, math.ceil(max(least, self.step) / self.step) * self.step)

    def count(self, ratio: float) -> int:
        """Groups to remove at a ratio: what is kept is the nearest multiple of the step, or all of them."""
        wanted, lowest = self.size - ratio * self.size, self._in_steps(self.least)
        # 1e-9: 0.1 · 5 must count as a half although (1 - 0.1) · 5 is not quite 4.5.
        kept = self.step * math.ceil(wanted / self.step - 0.5 - 1e-9)
        kept = min(max(kept, lowest), max(self.size // self.step * self.step, lowest))
        return 0 if self.size - wanted < wanted - kept - 1e-9 else self.size - kept

    def next_count(self, count: int) -> int:
        """The next larger number of groups that may go, or the same one if none may."""
        kept = (self.size - count - 1) // self.step * self.step
        return self.size - kept if kept >= self.lowest else count

    def stops(self, count: int) -> np.ndarray:
        """All numbers of groups that may go beyond ``count``, ascending."""
        first = self.next_count(count)
        return np.arange(first, self.most + 1, self.step) if first > count else np.zeros(0, dtype=np.int64)

    def next_score(self, count: int) -> float:
        """Score of what goes between ``count`` and the next number, relative to the ladder's mean."""
        mean = np.abs(self.scores).mean()
        going = self.scores[count : self.next_count(count)]
        return float(going.mean() / mean if mean > 0 else going.mean()) if len(going) else math.inf


@dataclass(frozen=True, eq=False)
class Column:
    """Ladders that are climbed together: one family, or, in a uniform plan, a kind in all its layers."""

    name: str
    ladders: tuple[Ladder, ...]

    @property
    def first(self) -> Ladder:
        return self.ladders[0]

    @property
    def kind(self) -> str:
        return self.first.kind


Counts = np.ndarray
"""Groups that go, one number per column."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps in the order in which they are taken: after step i, ``after[i]`` groups of ``column[i]`` went."""

    column: np.ndarray
    after: np.ndarray

    def __len__(self) -> int:
        return len(self.column)

    def advance(self, counts: Counts, number: int) -> Counts:
        """The counts after the first so many steps."""
        moved = counts.copy()
        np.maximum.at(moved, self.column[:number], self.after[:number])
        return moved

    def then(self, other: Steps) -> Steps:
        """These steps, and after them others."""
        return Steps(np.concatenate([self.column, other.column]), np.concatenate([self.after, other.after]))

    def where(self, chosen: np.ndarray) -> Steps:
        """Some of the steps, in the same order."""
        return Steps(self.column[chosen], self.after[chosen])


def sorted_steps(keys: list[np.ndarray], after: list[np.ndarray]) -> Steps:
    """Steps of all columns in the order of their keys, ties by column and then as they come.

    Args:
        keys: per column, one number per step.
        after: per column, groups gone after each step.
    """
    column = np.repeat(np.arange(len(after)), [len(found) for found in after])
    order = np.argsort(np.concatenate(keys), kind="stable")
    return Steps(column[order], np.concatenate(after)[order].astype(np.int64))


def columns_of(ladders: Iterable[Ladder], *, uniform: bool) -> list[Column]:
    """One column per ladder; in a uniform plan, one for all ladders of a kind.

    Raises:
        ValueError: a uniform plan over families of one kind whose sizes differ.
    """
    if not uniform:
        return [Column(ladder.name, (ladder,)) for ladder in ladders]
    by_kind: dict[str, list[Ladder]] = {}
    for ladder in ladders:
        by_kind.setdefault(ladder.kind, []).append(ladder)
    for kind, members in by_kind.items():
        sizes = sorted({ladder.size for ladder in members})
        if len(sizes) > 1:
            raise ValueError(
                f"uniform=True wants one width in all layers, but the {kind} families of this model have "
                f"{', '.join(map(str, sizes))} groups; leave uniform off, or this kind out"
            )
    return [Column(kind, tuple(members)) for kind, members in by_kind.items()]


def state_of(columns: Iterable[Column], counts: Counts) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """``(removal, dropped)`` when each column has lost so many groups."""
    removal: dict[str, np.ndarray] = {}
    dropped: list[str] = []
    for column, count in zip(columns, counts.tolist(), strict=True):
        for ladder in column.ladders:
            going = ladder.order[:count]
            if ladder.units:
                dropped += [ladder.units[unit] for unit in going]
            elif len(going):
                removal[ladder.name] = going
    return removal, tuple(dropped)


def family_ladder(family: GroupFamily, scores: Scores, limits: Limits) -> Ladder:
    """The ladder of one family: lowest scores first, ties by index.

    Raises:
        ValueError: scores that are missing, of another size or not finite; a limit that cannot be met.
    """
    values = _values(family.name, family.size, scores)
    order = np.argsort(values, kind="stable")
    if family.partition is not None:  # the lowest of every KV group first, then the second lowest …
        parts = family.partition[order]
        turn = np.array([np.count_nonzero(parts[:place] == part) for place, part in enumerate(parts)])
        order = order[np.argsort(turn, kind="stable")]
    step, least = limits.of(family)
    return Ladder(family.name, family.kind, family.size, order, values[order], step, least)


def depth_ladder(kind: str, units: Iterable[str], scores: Scores, limits: Limits) -> Ladder:
    """The ladder of all units of depth of a kind: lowest scores first, ties by layer.

    Raises:
        ValueError: scores that are missing, not one per unit, or not finite; a limit that cannot be met.
    """
    names = tuple(units)
    hint = f"score_layers(…, unit={kind!r}); to prune inside it use 'attention_head' or 'mlp_neuron'"
    values = np.array([_values(name, 1, scores, "unit of depth", hint)[0] for name in names])
    order = np.argsort(values, kind="stable")
    step, least = limits.of_units(kind, len(names))
    return Ladder(kind, kind, len(names), order, values[order], step, least, units=names)


def _values(
    name: str, size: int, scores: Scores, what: str = "family", hint: str = "families=…"
) -> np.ndarray:
    if name not in scores:
        raise ValueError(
            f"no scores for {what} {name!r}, which this plan would prune; estimate them ({hint}), "
            "or choose kinds and layers that have scores"
        )
    values = torch.as_tensor(scores[name]).detach().double().cpu().numpy()
    if values.shape != (size,):
        raise ValueError(
            f"{name} has {size} groups, its scores have shape {list(values.shape)}: "
            "these are scores of another model"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the scores of {name} hold NaN or infinity; estimate them again in float32")
    return values
