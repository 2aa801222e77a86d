"""Pruning: plans, and the cut that follows them."""

from .errors import PruningError
from .plan import PruningPlan
from .planning import plan_pruning
from .surgery import prune

__all__ = ["PruningError", "PruningPlan", "plan_pruning", "prune"]
