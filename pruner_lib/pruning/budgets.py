"""Meet a ratio or a budget: how many groups each family loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pruner_lib.discovery.units import depth_units
from pruner_lib.pruning.costs import CostSum, cost_terms
from pruner_lib.pruning.ladders import Column, Counts, Steps, sorted_steps, state_of
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.ranking import GlobalRanking, ranked_steps
from pruner_lib.pruning.selection import is_number, known

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

_UNIT = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes"}
_PASS = (1, 64)  # batch size and length at which targets count multiply-accumulates


@dataclass(frozen=True)
class Budget:
    """A ratio, or a target in one measure.

    Attributes:
        ratio: share of the groups of each family; one for all kinds or one per kind. None with a target.
        measure: ``"params"``, ``"macs"`` or ``"bytes"``.
        target: share of the dense model up to 1, or a count.
    """

    ratio: float | Mapping[str, float] | None = None
    measure: str = "params"
    target: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.ratio, Mapping):
            known(tuple(self.ratio), "ratio")
        for ratio in self.ratio.values() if isinstance(self.ratio, Mapping) else (self.ratio or 0,):
            if not is_number(ratio) or not 0 <= ratio < 1:
                raise ValueError(
                    f"ratio {ratio!r} is outside [0, 1): it is the share of groups removed from each family, "
                    "0.25 for a quarter. For a number of parameters use target_params"
                )
        if not is_number(self.target) or not 0 < self.target < math.inf:
            raise ValueError(
                f"target_{self.measure} {self.target!r} is no budget: give a share of the dense model up to "
                "1, or a count"
            )

    @classmethod
    def of(
        cls,
        ratio: float | Mapping[str, float] | None,
        *,
        params: float | None,
        macs: float | None,
        weight_bytes: float | None,
    ) -> Budget:
        """The one that was given.

        Raises:
            ValueError: none or several, or one out of its range.
        """
        targets = {"params": params, "macs": macs, "bytes": weight_bytes}
        given = {measure: target for measure, target in targets.items() if target is not None}
        names = [*(["ratio"] if ratio is not None else []), *(f"target_{measure}" for measure in given)]
        if len(names) != 1:
            found = f"{'both ' if len(names) == 2 else ''}{' and '.join(names)}" if names else "none of them"
            raise ValueError(
                f"give exactly one of ratio, target_params, target_macs and target_bytes; got {found}"
            )
        if ratio is not None:
            return cls(ratio=ratio)
        ((measure, target),) = given.items()
        return cls(measure=measure, target=target)

    def of_kind(self, kind: str) -> float:
        """The ratio of a kind; 0 for one that a mapping does not name."""
        return self.ratio.get(kind, 0.0) if isinstance(self.ratio, Mapping) else self.ratio or 0.0


class Search:
    """Finds how many groups each column loses; keeps nothing but what it was given."""

    def __init__(self, dependencies: DependencyMap, columns: list[Column], budget: Budget) -> None:
        self._dependencies = dependencies
        self._columns = columns
        self._budget = budget
        self._units = depth_units(dependencies) if any(c.first.units for c in columns) else {}
        self._families = np.array([len(column.ladders) for column in columns])
        self._none: Counts = np.zeros(len(columns), dtype=np.int64)

    @property
    def dense(self) -> int:
        """What the model costs before anything goes, in the measure of the budget."""
        return self._measure(self._none)

    @property
    def target(self) -> int:
        """The budget as a count; for a ratio, what the same ratio in every family would leave."""
        if self._budget.ratio is not None:
            return self._measure(self._at_ratio())
        target = self._budget.target
        return math.floor(target * self.dense if target <= 1 else target)

    def plan(self, counts: Counts) -> PruningPlan:
        """The plan in which each column has lost so many groups."""
        removal, dropped = state_of(self._columns, counts)
        groups = {name: going.tolist() for name, going in removal.items()}
        return PruningPlan.from_removal(self._dependencies, groups, dropped=dropped)

    def evenly(self) -> Counts:
        """The same share of every family."""
        if self._budget.ratio is not None:
            return self._at_ratio()
        target = self.target
        if self._already_met(target):
            return self._none
        low, high = self._bracket(target)
        # From low to high whole kinds jump at once. Let the families jump one by one, dearest groups
        # first, stop before the target, and cover the rest with single groups of the cheapest kind.
        prices = self._prices(self._budget.measure)
        ordered = sorted(
            np.flatnonzero(high > low).tolist(),
            key=lambda place: (-prices[place], self._columns[place].first.next_score(int(low[place]))),
        )
        jumps = Steps(np.array(ordered, dtype=np.int64), high[ordered])
        return self._finish(low, jumps, target, self._turns)

    def by_rank(self, ranking: GlobalRanking) -> Counts:
        """The lowest values of one ranking."""
        target = self.target
        if self._already_met(target):
            return self._none
        weigh = self._budget.measure if ranking.weigh == "none" else ranking.weigh
        steps = ranked_steps(self._columns, ranking, self._prices(weigh))

        def rest(cheapest: np.ndarray, now: Counts) -> Steps:
            return steps.where(np.isin(steps.column, cheapest) & (steps.after > now[steps.column]))

        crossing = self._first_fit(self._none, steps, target)
        before, after = (self._measure(steps.advance(self._none, n)) for n in (crossing - 1, crossing))
        if 2 * (before - target) >= before - after:  # half of the last step is needed, or more
            counts = self._give_back(steps.advance(self._none, crossing), target, rest)
            if target - self._measure(counts) < self._lowest_price(self._group_prices()):
                return counts
        return self._finish(self._none, steps, target, rest)

    def _at_ratio(self) -> Counts:
        return self._each(lambda column: column.first.count(self._budget.of_kind(column.kind)))

    def _each(self, number: Callable[[Column], int]) -> Counts:
        return np.array([number(column) for column in self._columns], dtype=np.int64)

    def _measure(self, counts: Counts, measure: str | None = None) -> int:
        removal, dropped = state_of(self._columns, counts)
        return self._sum(measure or self._budget.measure)(removal, [self._units[unit] for unit in dropped])

    def _sum(self, measure: str) -> CostSum:
        terms = cost_terms(self._dependencies)
        if measure == "macs":
            return terms.macs(*_PASS)
        return terms.params if measure == "params" else terms.weight_bytes

    def _already_met(self, target: int) -> bool:
        """True when nothing has to go; refuses a target that no plan meets."""
        dense, unit = self.dense, _UNIT[self._budget.measure]
        label, instead = f"target_{self._budget.measure} {target:,}", "larger target"
        if self._budget.ratio is not None:
            label, instead = f"ratio {self._budget.ratio}, in the global scope {label},", "smaller ratio"
        if target > dense:
            raise ValueError(
                f"{label} is above the dense model's {dense:,} {unit}; give fewer, or a share up to 1"
            )
        least = self._measure(self._each(lambda column: column.first.most))
        if least > target:
            count = sum(len(column.ladders) for column in self._columns)
            raise ValueError(
                f"{label} is out of reach: with {self._smallest()} left in each of the {count} "
                f"selected families, {least:,} of {dense:,} {unit} remain. "
                f"Choose a {instead}, more kinds or layers, or a lower floor or minimum"
            )
        return dense <= target

    def _smallest(self) -> str:
        kept = {column.first.size - column.first.most for column in self._columns}
        return "one group" if kept <= {1} else f"{min(kept)} to {max(kept)} groups"

    def _prices(self, measure: str) -> list[float]:
        """What one group of each column saves when only that group (of each of its families) goes."""
        dense = self._measure(self._none, measure)
        prices = []
        for place, column in enumerate(self._columns):
            counts = self._none.copy()
            counts[place] = first = column.first.next_count(0)
            saved = dense - self._measure(counts, measure) if first else 0
            prices.append(saved / max(first, 1) / len(column.ladders))
        return prices

    def _group_prices(self) -> np.ndarray:
        """What a column saves by its smallest move, in the measure of the budget; 0 if it has none."""
        return np.array(self._prices(self._budget.measure)) * self._families

    def _lowest_price(self, prices: np.ndarray) -> float:
        """The least that a column which has groups to lose saves by its smallest move."""
        able = [column.first.next_count(0) > 0 for column in self._columns]
        return float(prices[able].min())

    def _bracket(self, target: int) -> tuple[Counts, Counts]:
        """The two neighbouring sets of counts, each of one common ratio, around the target."""
        low, high = self._none, self._each(lambda column: column.first.most)
        under, over = 0.0, 1.0
        for _ in range(48):  # below the spacing of any two ratios that round differently
            ratio = (under + over) / 2
            counts = self._each(lambda column, ratio=ratio: column.first.count(ratio))  # type: ignore[misc]
            met = np.array_equal(counts, high)
            if met or (not np.array_equal(counts, low) and self._measure(counts) <= target):
                over, high = ratio, counts
            else:
                under, low = ratio, counts
        return low, high

    def _finish(
        self,
        low: Counts,
        jumps: Steps,
        target: int,
        single_steps: Callable[[np.ndarray, Counts], Steps],
    ) -> Counts:
        """Jump until just before the target, then take single groups of the cheapest kind."""
        crossing = self._first_fit(low, jumps, target)
        below = jumps.advance(low, crossing - 1)
        now = zip(self._columns, below.tolist(), strict=True)
        movable = np.flatnonzero([column.first.next_count(count) > count for column, count in now])
        prices = self._group_prices()
        cheapest = movable[prices[movable] == prices[movable].min()]
        last = jumps.where(np.arange(len(jumps)) == crossing - 1)
        steps = single_steps(cheapest, below).then(last)
        counts = steps.advance(below, self._first_fit(below, steps, target))
        return self._give_back(counts, target, single_steps)

    def _give_back(
        self, counts: Counts, target: int, single_steps: Callable[[np.ndarray, Counts], Steps]
    ) -> Counts:
        """Give single groups of the cheapest kind back, the last taken first, while the target is met."""
        prices = self._group_prices()
        price = self._lowest_price(prices)
        cheapest = np.flatnonzero(np.isclose(prices, price) & (counts > 0))
        if not len(cheapest) or target - self._measure(counts) < price:
            return counts
        start = counts.copy()
        start[cheapest] = 0
        if self._measure(start) <= target:
            return start
        steps = single_steps(cheapest, start)
        steps = steps.where(steps.after <= counts[steps.column])
        return steps.advance(start, self._first_fit(start, steps, target))

    def _first_fit(self, counts: Counts, steps: Steps, target: int) -> int:
        """Length of the shortest prefix of ``steps`` that fits; all of them together do."""
        short, enough = 0, len(steps)
        while enough - short > 1:
            middle = (short + enough) // 2
            if self._measure(steps.advance(counts, middle)) <= target:
                enough = middle
            else:
                short = middle
        return enough

    def _turns(self, places: np.ndarray, counts: Counts) -> Steps:
        """One more group at a time, from the columns that have lost the smallest share so far."""
        stops = [np.zeros(0, dtype=np.int64) for _ in self._columns]
        shares = [np.zeros(0) for _ in self._columns]
        for place in places.tolist():
            ladder = self._columns[place].first
            stops[place] = ladder.stops(int(counts[place]))
            shares[place] = np.concatenate([counts[place : place + 1], stops[place][:-1]]) / ladder.size
        return sorted_steps(shares, stops)
