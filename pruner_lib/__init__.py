"""Structural pruning of causal language models: discover, score, plan, prune, recover, evaluate.

    model ──discover──▶ DependencyMap ──estimate_importance──▶ ImportanceScores ──plan_pruning──▶ PruningPlan
    EvaluationReport ◀──evaluate── recovered ◀──recover── smaller model ◀──prune──┘

Importing this package lets ``from_pretrained`` open checkpoints whose layers differ in width.
"""

from pruner_lib.assets import (
    DEFAULT_MODEL,
    PAPER_CALIBRATION,
    load_calibration,
    load_model,
    load_text,
)
from pruner_lib.checkpoint import (
    CheckpointError,
    load_pruned,
    save_pruned,
)
from pruner_lib.discovery import (
    DependencyMap,
    DiscoveryError,
    discover,
)
from pruner_lib.evaluation import (
    PAPER_TASKS,
    count_cost,
    evaluate,
    generate,
    measure_latency,
    measure_memory,
    perplexity,
    zero_shot,
)
from pruner_lib.importance import (
    ImportanceScores,
    estimate_importance,
    grade,
    measure_importance,
    scale_to_loss,
    score_layers,
)
from pruner_lib.pruning import (
    Compensation,
    GlobalRanking,
    PruningError,
    PruningPlan,
    compensate,
    plan_pruning,
    prune,
    prune_iteratively,
    prune_layers,
    scan_sensitivity,
)
from pruner_lib.recovery import (
    Distillation,
    RecoverySettings,
    attach_adapter,
    load_instructions,
    merge_adapter,
    recover,
)

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MODEL",
    "PAPER_CALIBRATION",
    "PAPER_TASKS",
    "CheckpointError",
    "Compensation",
    "DependencyMap",
    "DiscoveryError",
    "Distillation",
    "GlobalRanking",
    "ImportanceScores",
    "PruningError",
    "PruningPlan",
    "RecoverySettings",
    "attach_adapter",
    "compensate",
    "count_cost",
    "discover",
    "estimate_importance",
    "evaluate",
    "generate",
    "grade",
    "load_calibration",
    "load_instructions",
    "load_model",
    "load_pruned",
    "load_text",
    "measure_importance",
    "measure_latency",
    "measure_memory",
    "merge_adapter",
    "perplexity",
    "plan_pruning",
    "prune",
    "prune_iteratively",
    "prune_layers",
    "recover",
    "save_pruned",
    "scale_to_loss",
    "scan_sensitivity",
    "score_layers",
    "zero_shot",
]
