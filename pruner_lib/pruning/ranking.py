"""One ranking across families of any kind and layer, for ``scope="global"``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from pruner_lib.pruning.ladders import Column, Ladder, Steps, sorted_steps
from pruner_lib.pruning.selection import is_number, known

STANDARDISE = ("none", "mean", "max", "sum", "rms", "zscore", "robust", "rank")
OVER = ("family", "kind")
WEIGH = ("none", "params", "macs", "bytes")
_ROUNDING = 1e-12  # of the largest score: a deviation below it is none


@dataclass(frozen=True)
class GlobalRanking:
    r"""How groups of different families are compared in ``scope="global"``.

    Each group i of family f, of kind k, with score s_i and cost c_i, gets the value

        v_i = w_k · (standardised s_i) / c_i

    and the groups of the lowest values go first, wherever they are, until the budget is met. With S
    the scores that are standardised together (``over``), the standardised score is

        none s      mean s / mean\|S\|      max s / max\|S\|      sum s / Σ\|S\|      rms s / √mean S²
        zscore (s − mean S) / std S        robust (s − median S) / MAD S
        rank   (number of S below s, plus half the number equal) / \|S\|

    where MAD is the median absolute deviation, or, should that be 0 (more than half of S are alike), the
    mean one. Scores that differ by rounding alone count as equal. Where a standardised score is negative,
    all are shifted so that the lowest is 0 before they are weighed. c_i is what the dense model saves when
    only this group goes. A group of several heads (query heads, one from each KV head; ``round_to``) has
    the sum of its scores and of its costs.

    Example:
        >>> ranking = GlobalRanking(standardise="none", weigh="params", floor={"mlp_neuron": 0.3})
        >>> plan_pruning(dependencies, scores, target_params=0.8, scope="global", ranking=ranking)

    Attributes:
        standardise: one of the names above.
        over: ``"family"``: scores of one family together (for layers dropped whole: all of them), so
            that families with larger scores are no safer; ``"kind"``: all families of a kind together,
            so that layers that matter more keep more.
        weigh: the cost c_i, in ``"params"``, ``"macs"`` (at 1 × 64 tokens) or ``"bytes"``; ``"none"``
            for c_i = 1.
        floor: share of its groups that every family keeps, in [0, 1]; a number for all kinds or one per kind
            (0 for kinds not named). It keeps a family from vanishing; one group always stays. In
            ``prune_iteratively`` it is a share of the dense model's groups in every step.
        kind_weights: w_k per kind, 1 if not named; above 1 protects a kind.

    Raises:
        ValueError: an unknown name or kind, a floor outside [0, 1], a weight that is not positive.

    Source: standardised scores in one ranking, FLAP (arXiv 2312.11983); cost in the denominator,
        Molchanov et al. (arXiv 1611.06440), section 2.2.
    """

    standardise: str = "mean"
    over: str = "family"
    weigh: str = "params"
    floor: float | Mapping[str, float] = 0.1
    kind_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, value, valid in (
            ("standardise", self.standardise, STANDARDISE),
            ("over", self.over, OVER),
            ("weigh", self.weigh, WEIGH),
        ):
            if value not in valid:
                raise ValueError(f"unknown {label} {value!r}; valid are {', '.join(valid)}")
        if isinstance(self.floor, Mapping):
            object.__setattr__(self, "floor", MappingProxyType(dict(self.floor)))
        floors = self.floor if isinstance(self.floor, Mapping) else {"": self.floor}
        for kind, floor in floors.items():
            if not is_number(floor) or not 0 <= floor <= 1:
                where = f" of {kind}" if kind else ""
                raise ValueError(f"floor {floor!r}{where} is outside [0, 1]: it is the share of groups kept")
        for kind, weight in self.kind_weights.items():
            if not is_number(weight) or not 0 < weight < math.inf:
                raise ValueError(f"the weight of {kind} must be positive, not {weight!r}")
        known(tuple(floors) if isinstance(self.floor, Mapping) else ("block",), "floor")
        known(tuple(self.kind_weights) or ("block",), "kind_weights")
        object.__setattr__(self, "kind_weights", MappingProxyType(dict(self.kind_weights)))

    def least(self, ladder: Ladder) -> int:
        """The fewest groups that the floor leaves a ladder."""
        share = self.floor.get(ladder.kind, 0.0) if isinstance(self.floor, Mapping) else self.floor
        return math.ceil(share * ladder.size - 1e-9)


def ranked_steps(columns: Sequence[Column], ranking: GlobalRanking, prices: Sequence[float]) -> Steps:
    """Every step that a column may take, the least valuable first.

    Args:
        columns: what moves.
        ranking: how values are made.
        prices: what one group of each column costs.
    """
    standard = _standardised(columns, ranking)
    shift = min(0.0, *(float(values.min()) for values in standard.values()))
    values, after = [], []
    for column, price in zip(columns, prices, strict=True):
        stops = column.first.stops(0)
        starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
        mean = np.mean([standard[ladder.name] for ladder in column.ladders], axis=0)
        total = np.concatenate([[0.0], np.cumsum(mean)])
        of_group = (total[stops] - total[starts]) / np.maximum(stops - starts, 1) - shift
        weight = ranking.kind_weights.get(column.kind, 1.0)
        value = weight * of_group / (1.0 if ranking.weigh == "none" else max(price, 1e-30))
        values.append(np.maximum.accumulate(value))  # within a column the order is that of its own scores
        after.append(stops)
    return sorted_steps(values, after)


def _standardised(columns: Sequence[Column], ranking: GlobalRanking) -> dict[str, np.ndarray]:
    together: dict[str, list[Ladder]] = {}
    for column in columns:
        for ladder in column.ladders:
            together.setdefault(ladder.name if ranking.over == "family" else ladder.kind, []).append(ladder)
    found = {}
    for ladders in together.values():
        pool = np.concatenate([ladder.scores for ladder in ladders])
        for ladder in ladders:
            found[ladder.name] = _standardise(ladder.scores, pool, ranking.standardise)
    return found


def _standardise(scores: np.ndarray, pool: np.ndarray, how: str) -> np.ndarray:
    if how == "rank":
        ordered = np.sort(pool)
        below, upto = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
        return (below + upto) / (2 * len(pool))
    middle = {"zscore": pool.mean(), "robust": np.median(pool)}.get(how, 0.0)
    scale = {
        "none": lambda: 1.0,
        "mean": lambda: np.abs(pool).mean(),
        "max": lambda: np.abs(pool).max(),
        "sum": lambda: np.abs(pool).sum(),
        "rms": lambda: np.sqrt((pool**2).mean()),
        "zscore": lambda: pool.std(),
        "robust": lambda: np.median(np.abs(pool - middle)) or np.abs(pool - middle).mean(),
    }[how]()
    rounding = 0.0 if how == "none" else _ROUNDING * np.abs(pool).max()
    return (scores - middle) / scale if scale > rounding else np.zeros_like(scores)
