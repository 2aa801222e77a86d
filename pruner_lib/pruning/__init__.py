"""Pruning: plans, and the cut that follows them."""

from .compensation import Compensated, Compensation, compensate
from .costs import Cost
from .depth import DropStep, drop_greedily, plan_layers, prune_layers
from .errors import PruningError
from .plan import PruningPlan
from .planning import plan_pruning
from .presets import PRESETS, Preset
from .ranking import GlobalRanking
from .schedule import PruningStep, prune_iteratively
from .sensitivity import Sensitivity, scan_sensitivity
from .surgery import prune

__all__ = [
    "PRESETS",
    "Compensated",
    "Compensation",
    "Cost",
    "DropStep",
    "GlobalRanking",
    "Preset",
    "PruningError",
    "PruningPlan",
    "PruningStep",
    "Sensitivity",
    "compensate",
    "drop_greedily",
    "plan_layers",
    "plan_pruning",
    "prune",
    "prune_iteratively",
    "prune_layers",
    "scan_sensitivity",
]
