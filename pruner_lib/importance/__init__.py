"""Importance: how much an element, vector, group or layer matters, estimated or measured, and graded."""

from pruner_lib.importance.ablation import loss_changes, measure_importance
from pruner_lib.importance.criteria import CRITERIA, REDUCTIONS, Criterion
from pruner_lib.importance.estimate import estimate_importance
from pruner_lib.importance.grading import Grade, grade
from pruner_lib.importance.granularity import element_scores, vector_scores
from pruner_lib.importance.layers import score_layers
from pruner_lib.importance.loss_scale import scale_to_loss
from pruner_lib.importance.scores import ImportanceScores, RankCorrelation

__all__ = [
    "CRITERIA",
    "REDUCTIONS",
    "Criterion",
    "Grade",
    "ImportanceScores",
    "RankCorrelation",
    "element_scores",
    "estimate_importance",
    "grade",
    "loss_changes",
    "measure_importance",
    "scale_to_loss",
    "score_layers",
    "vector_scores",
]
