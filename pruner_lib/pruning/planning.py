"""From scores to a plan: which groups to remove for a ratio or a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pruner_lib.discovery.families import KINDS, GroupFamily
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

Counts = dict[str, int]


def plan_pruning(
    dependencies: DependencyMap,
    scores: ImportanceScores | Mapping[str, Tensor],
    *,
    ratio: float | None = None,
    target_params: float | None = None,
    scope: str = "local",
    layers: Iterable[int] | None = None,
    kinds: str | Iterable[str] = ("attention_head", "mlp_neuron"),
    round_to: int | Mapping[str, int] = 1,
) -> PruningPlan:
    """Remove the lowest-scored groups of every selected family.

    Of a family of n groups, ``ratio`` r removes r·n rounded to the nearest whole number, halves
    upwards, and always leaves one: 3 KV heads at 0.25 lose 1 (0.75), 1536 neurons lose 384. Query
    heads go in equal numbers from every KV group. Ties go to the lower index.

    A target takes the largest common ratio that leaves too many parameters, then lets family after
    family go to the next ratio (heads before neurons, the least important first), then removes single
    groups of the cheapest kind, until at most that many parameters are left. What is left is less
    than one group's size below the target.

    Example:
        >>> plan_pruning(dependencies, scores, ratio=0.25, layers=range(4, 27))
        >>> plan_pruning(dependencies, scores, target_params=0.8, kinds="mlp_neuron")

    Args:
        dependencies: what ``discover`` found in the model.
        scores: one tensor ``[size]`` for every selected family.
        ratio: share of groups removed from each family, in [0, 1).
        target_params: parameters to be left at most; up to 1 is a share of the dense model, above
            1 a count. Give this or ``ratio``.
        scope: ``"local"``: every family loses the same share.
        layers: decoder layers, counted from 0; None for all families of the kinds.
        kinds: which kinds of family to prune.
        round_to: the groups left in a family that loses any are a multiple of this; a number for
            all kinds, or a number per kind.

    Returns:
        The plan; nothing is cut yet.

    Raises:
        ValueError: both or neither of ratio and target, or one out of its range; an unknown scope,
            kind or layer; a kind that this model has not, or only blocked; a ``round_to`` that
            cannot be met; missing or unusable scores; a target that cannot be reached.

    Source: local ratios, LLM-Pruner, arXiv 2305.11627, section 3.3.
    """
    _check_budget(ratio, target_params, scope)
    kinds = _known((kinds,) if isinstance(kinds, str) else tuple(kinds), "kinds")
    if isinstance(round_to, Mapping):
        _known(tuple(round_to), "round_to")
    families = _select(dependencies, layers, kinds)
    ladders = [_ladder(family, scores, _multiple(family, round_to)) for family in families]
    if ratio is not None:
        return _plan(dependencies, ladders, {ladder.name: ladder.count(ratio) for ladder in ladders})
    assert target_params is not None
    dense = PruningPlan(removal={}, dependencies=dependencies).params_before
    target = math.floor(target_params * dense) if target_params <= 1 else math.floor(target_params)
    return _meet_target(dependencies, ladders, target)


@dataclass(frozen=True, eq=False)
class _Ladder:
    """The order in which a family loses its groups, and the numbers it may lose.

    Attributes:
        family: whose groups.
        order: group indices, the first to go first; for query heads, one of each KV group in turn.
        values: score of each in that order, relative to the family's mean.
        step: the kept number is a multiple of this.
    """

    family: GroupFamily
    order: np.ndarray
    values: np.ndarray
    step: int

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def most(self) -> int:
        """Largest number of groups that may go."""
        return self.family.size - self.step

    def count(self, ratio: float) -> int:
        """Groups to remove at a ratio: the kept number is the nearest multiple of the step."""
        if ratio == 0:
            return 0
        size = self.family.size
        # 1e-9: 0.1 · 5 must count as a half although (1 - 0.1) · 5 is not quite 4.5.
        kept = self.step * math.ceil((size - ratio * size) / self.step - 0.5 - 1e-9)
        return size - min(max(kept, self.step), size // self.step * self.step)

    def next_count(self, count: int) -> int:
        """The next larger number of groups that may go, or the same one if none may."""
        kept = (self.family.size - count - 1) // self.step * self.step
        return self.family.size - kept if kept >= self.step else count

    def next_value(self, count: int) -> float:
        """Relative score of what goes between ``count`` and the next number."""
        return float(self.values[count : self.next_count(count)].mean()) if count < self.most else math.inf


def _plan(dependencies: DependencyMap, ladders: list[_Ladder], counts: Counts) -> PruningPlan:
    removal = {ladder.name: tuple(ladder.order[: counts[ladder.name]].tolist()) for ladder in ladders}
    return PruningPlan.from_removal(dependencies, removal)


def _meet_target(dependencies: DependencyMap, ladders: list[_Ladder], target: int) -> PruningPlan:
    """At most ``target`` parameters, and less than one group's size below it."""

    def plan(counts: Counts) -> PruningPlan:
        return _plan(dependencies, ladders, counts)

    def fits(counts: Counts) -> bool:
        return plan(counts).params_after <= target

    low = {ladder.name: 0 for ladder in ladders}
    high = {ladder.name: ladder.most for ladder in ladders}
    if fits(low):
        _refuse_above_dense(plan(low).params_before, target)
        return plan(low)
    if not fits(high):
        raise ValueError(
            f"target_params {target:,} is out of reach: with one group left in each of the {len(ladders)} "
            f"selected families, {plan(high).params_after:,} of {plan(high).params_before:,} parameters "
            "remain. Choose a larger target, or more kinds or layers"
        )
    low, high = _bracket(ladders, low, high, fits)
    # From low to high whole kinds jump at once. Let the families jump one by one, dearest groups
    # first, stop before the target, and cover the rest with single groups of the cheapest kind.
    cost = {ladder.name: _group_size(ladder.family, dependencies) for ladder in ladders}
    ordered = sorted(ladders, key=lambda ladder: (-cost[ladder.name], ladder.next_value(low[ladder.name])))
    jumps = [(ladder.name, high[ladder.name]) for ladder in ordered if high[ladder.name] > low[ladder.name]]
    crossing = _first_fit(low, jumps, fits)
    below = _advance(low, jumps[: crossing - 1])
    cheapest = [ladder for ladder in ordered if cost[ladder.name] == min(cost.values())]
    steps = [*_single_steps(cheapest, below), jumps[crossing - 1]]
    return plan(_advance(below, steps[: _first_fit(below, steps, fits)]))


def _bracket(
    ladders: list[_Ladder], low: Counts, high: Counts, fits: Callable[[Counts], bool]
) -> tuple[Counts, Counts]:
    """The two neighbouring sets of counts, each of one common ratio, around the target."""
    under, over = 0.0, 1.0
    for _ in range(48):  # below the spacing of any two ratios that round differently
        ratio = (under + over) / 2
        counts = {ladder.name: ladder.count(ratio) for ladder in ladders}
        if counts == high or (counts != low and fits(counts)):
            over, high = ratio, counts
        else:
            under, low = ratio, counts
    return low, high


def _advance(counts: Counts, steps: Iterable[tuple[str, int]]) -> Counts:
    moved = dict(counts)
    for name, count in steps:
        moved[name] = max(moved[name], count)
    return moved


def _first_fit(counts: Counts, steps: list[tuple[str, int]], fits: Callable[[Counts], bool]) -> int:
    """Length of the shortest prefix of ``steps`` that fits; all of them together do."""
    short, enough = 0, len(steps)
    while enough - short > 1:
        middle = (short + enough) // 2
        if fits(_advance(counts, steps[:middle])):
            enough = middle
        else:
            short = middle
    return enough


def _single_steps(ladders: list[_Ladder], counts: Counts) -> list[tuple[str, int]]:
    """One more group at a time, from the families that have lost the smallest share so far."""

    def share(ladder: _Ladder) -> float:
        return now[ladder.name] / ladder.family.size

    now, steps = dict(counts), []
    while movable := [ladder for ladder in ladders if ladder.next_count(now[ladder.name]) > now[ladder.name]]:
        least = min(map(share, movable))
        for ladder in movable:
            if share(ladder) == least:
                now[ladder.name] = ladder.next_count(now[ladder.name])
                steps.append((ladder.name, now[ladder.name]))
    return steps


def _group_size(family: GroupFamily, dependencies: DependencyMap) -> int:
    """Parameters of one group, as if nothing else were cut."""
    total = 0
    for piece in family.slices:
        shape = dependencies.shapes.get(piece.parameter)
        if shape is not None:
            total += math.prod(shape) // shape[piece.dim] * int(piece.index[0].size)
    return total


def _refuse_above_dense(dense: int, target: int) -> None:
    if target > dense:
        raise ValueError(
            f"target_params {target:,} is above the dense model's {dense:,} parameters; "
            "give fewer, or a share up to 1"
        )


def _check_budget(ratio: float | None, target_params: float | None, scope: str) -> None:
    if scope != "local":
        raise ValueError(f"unknown scope {scope!r}; valid is 'local': every family loses the same share")
    if (ratio is None) == (target_params is None):
        given = "neither" if ratio is None else "both"
        raise ValueError(f"give exactly one of ratio and target_params; got {given}")
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(
            f"ratio {ratio} is outside [0, 1): it is the share of groups removed from each family, "
            "0.25 for a quarter. For a number of parameters use target_params"
        )
    if target_params is not None and not 0 < target_params < math.inf:
        raise ValueError(
            f"target_params {target_params} is no budget: give a share of the dense model up to 1, or a count"
        )


def _known(kinds: tuple[str, ...], argument: str) -> tuple[str, ...]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        asked = f"unknown kind {unknown[0]!r} in {argument}" if unknown else f"no kinds given in {argument}"
        raise ValueError(f"{asked}; valid are {', '.join(KINDS)}")
    return kinds


def _select(
    dependencies: DependencyMap, layers: Iterable[int] | None, kinds: tuple[str, ...]
) -> list[GroupFamily]:
    """Cuttable families of the kinds in the layers; each kind must have some there."""
    chosen = None if layers is None else sorted(set(layers))
    last = dependencies.num_layers - 1
    if chosen is not None and (not chosen or chosen[0] < 0 or chosen[-1] > last):
        found = f"{chosen[0]} to {chosen[-1]}" if chosen else "none"
        raise ValueError(
            f"layers {found} asked for; the model has {dependencies.num_layers} layers, "
            f"counted from 0 to {last}"
        )
    return [family for kind in dict.fromkeys(kinds) for family in _of_kind(dependencies, kind, chosen)]


def _of_kind(dependencies: DependencyMap, kind: str, layers: list[int] | None) -> list[GroupFamily]:
    present = [family for family in dependencies.families if family.kind == kind]
    placed = [family for family in present if layers is None or family.layer in layers]
    found = [family for family in placed if family.cuttable]
    if found:
        return found
    cuttable = dict.fromkeys(family.kind for family in dependencies.families if family.cuttable)
    if not present:
        reason = "this model has none"
    elif not placed:
        reason = "none in these layers (families that span layers need layers=None)"
    else:
        reason = f"it cannot be cut here: {placed[0].blocked}"
    raise ValueError(f"kind {kind!r}: {reason}. Kinds that can be cut in this model: {', '.join(cuttable)}")


def _multiple(family: GroupFamily, round_to: int | Mapping[str, int]) -> int:
    """What the kept number of groups must be a multiple of; for query heads, of the KV groups too."""
    wanted = round_to.get(family.kind, 1) if isinstance(round_to, Mapping) else round_to
    if wanted < 1:
        raise ValueError(f"round_to must be at least 1, not {wanted}")
    parts = 1 if family.partition is None else len(np.unique(family.partition))
    multiple = math.lcm(wanted, parts)
    if multiple > family.size:
        raise ValueError(
            f"round_to {wanted} cannot be met by {family.name}: it has {family.size} groups"
            + (f" in {parts} equal parts" if parts > 1 else "")
            + f". Give a number per kind, for example round_to={{'mlp_neuron': {wanted}}}"
        )
    return multiple


def _ladder(family: GroupFamily, scores: ImportanceScores | Mapping[str, Tensor], step: int) -> _Ladder:
    if family.name not in scores:
        raise ValueError(
            f"no scores for family {family.name!r}, which this plan would prune; estimate them "
            f"(families=…), or choose kinds and layers that have scores"
        )
    values = torch.as_tensor(scores[family.name]).detach().double().cpu().numpy()
    if values.shape != (family.size,):
        raise ValueError(
            f"{family.name} has {family.size} groups, its scores have shape {list(values.shape)}: "
            "these are scores of another model"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"the scores of {family.name} hold NaN or infinity; estimate them again in float32")
    order = np.argsort(values, kind="stable")
    if family.partition is not None:  # the lowest of every KV group first, then the second lowest …
        parts = family.partition[order]
        turn = np.array([np.count_nonzero(parts[:place] == part) for place, part in enumerate(parts)])
        order = order[np.argsort(turn, kind="stable")]
    mean = np.abs(values).mean()
    return _Ladder(family, order, values[order] / mean if mean > 0 else values[order], step)
