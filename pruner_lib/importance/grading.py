"""How right estimated scores are, judged by the measured loss change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pruner_lib.importance.scores import ImportanceScores, spearman


@dataclass(frozen=True)
class Grade:
    """How well scores agree with the truth.

    Attributes:
        rank_correlation: family name to Spearman's ρ; NaN where one side is constant.
        overlap: family name to the share of the truth's lowest groups that are the scores' lowest too;
            by chance it is ``ratio``.
        ratio: the share of groups that counts as lowest.
    """

    rank_correlation: Mapping[str, float]
    overlap: Mapping[str, float]
    ratio: float

    @property
    def spearman(self) -> float:
        """Mean of ρ over the families where it is defined; NaN if there is none."""
        return _mean(self.rank_correlation)

    @property
    def lowest(self) -> float:
        """Mean of the overlap over all families."""
        return _mean(self.overlap)

    def __repr__(self) -> str:
        return (
            f"Grade(Spearman {self.spearman:.3f}, overlap of the lowest {100 * self.ratio:.0f} % "
            f"{100 * self.lowest:.0f} %, over {len(self.overlap)} families)"
        )


def _mean(values: Mapping[str, float]) -> float:
    defined = [value for value in values.values() if value == value]
    return sum(defined) / len(defined) if defined else float("nan")


def grade(
    scores: ImportanceScores,
    truth: ImportanceScores,
    *,
    ratio: float = 0.25,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> Grade:
    """Judge estimates by what was measured: rank correlation, and who would be removed.

    >>> truth = measure_importance(model, dependencies, batches, "layers.5.mlp_neuron")
    >>> grade(scores, truth)
    Grade(Spearman 0.712, overlap of the lowest 25 % 61 %, over 1 families)

    Args:
        scores: estimates.
        truth: from ``measure_importance``, or other scores to compare with.
        ratio: the share of groups that counts as lowest, in (0, 1).
        groups: family name to the groups that ``truth`` holds, in its order, where not all were measured.

    Returns:
        One grade per family that both hold.

    Raises:
        ValueError: no family in common, sizes that differ, or a ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie between 0 and 1, such as 0.25; got {ratio}")
    common = [name for name in truth if name in scores]
    if not common:
        raise ValueError(
            f"scores and truth have no family in common: {', '.join(list(scores)[:3])} … against "
            f"{', '.join(list(truth)[:3])} …; measure the families that were estimated"
        )
    correlations, overlaps = {}, {}
    for name in common:
        estimate, measured = scores[name], truth[name]
        if groups is not None and name in groups:
            estimate = estimate[torch.as_tensor(groups[name])]
        if len(estimate) != len(measured):
            raise ValueError(
                f"{name} has {len(estimate)} scores and {len(measured)} measured groups; for a sample of "
                "groups give groups={name: indices}"
            )
        correlations[name] = spearman(estimate, measured)
        overlaps[name] = overlap_of_lowest(estimate, measured, ratio)
    return Grade(MappingProxyType(correlations), MappingProxyType(overlaps), ratio)


def overlap_of_lowest(first: Tensor, second: Tensor, ratio: float) -> float:
    """Share of the lowest groups that two vectors ``[n]`` have in common; by chance it is the ratio itself.

    The lowest are round(ratio · n) groups, at least one; ties go to the lower index.
    """
    count = max(1, round(ratio * len(first)))
    lowest = [set(values.argsort(stable=True)[:count].tolist()) for values in (first, second)]
    return len(lowest[0] & lowest[1]) / count
