"""Importance: how much a group matters, estimated from weights and gradients or measured by ablation."""

from pruner_lib.importance.ablation import measure_importance
from pruner_lib.importance.criteria import CRITERIA, REDUCTIONS, Criterion
from pruner_lib.importance.estimate import estimate_importance
from pruner_lib.importance.scores import ImportanceScores, RankCorrelation

__all__ = [
    "CRITERIA",
    "REDUCTIONS",
    "Criterion",
    "ImportanceScores",
    "RankCorrelation",
    "estimate_importance",
    "measure_importance",
]
