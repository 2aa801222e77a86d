"""Evaluation: perplexity, zero-shot accuracy, cost, memory, latency and generations, model beside model.

``python -m pruner_lib.evaluation FOLDER [FOLDER …]`` makes a report from checkpoint folders.
"""

from pruner_lib.evaluation.activations import count_activations
from pruner_lib.evaluation.cost import Cost, count_cost
from pruner_lib.evaluation.generation import Generation, GenerationTable, generate
from pruner_lib.evaluation.latency import Latency, LatencyTable, measure_latency
from pruner_lib.evaluation.measuring import evaluate
from pruner_lib.evaluation.memory import Memory, measure_memory
from pruner_lib.evaluation.perplexity import Perplexity, perplexity
from pruner_lib.evaluation.report import EvaluationReport, EvaluationRow
from pruner_lib.evaluation.running import EvaluationError
from pruner_lib.evaluation.tasks import PAPER_TASKS, write_task_files
from pruner_lib.evaluation.zero_shot import ZeroShotOptions, zero_shot
from pruner_lib.evaluation.zero_shot_result import Estimate, TaskScore, ZeroShotResult

__all__ = [
    "PAPER_TASKS",
    "Cost",
    "Estimate",
    "EvaluationError",
    "EvaluationReport",
    "EvaluationRow",
    "Generation",
    "GenerationTable",
    "Latency",
    "LatencyTable",
    "Memory",
    "Perplexity",
    "TaskScore",
    "ZeroShotOptions",
    "ZeroShotResult",
    "count_activations",
    "count_cost",
    "evaluate",
    "generate",
    "measure_latency",
    "measure_memory",
    "perplexity",
    "write_task_files",
    "zero_shot",
]
