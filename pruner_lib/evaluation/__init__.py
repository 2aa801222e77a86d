"""Evaluation: perplexity, cost, latency and generations, for any number of models side by side."""

from pruner_lib.evaluation.cost import Cost, count_cost
from pruner_lib.evaluation.generation import Generation, GenerationTable, generate
from pruner_lib.evaluation.latency import Latency, LatencyTable, measure_latency
from pruner_lib.evaluation.perplexity import Perplexity, perplexity
from pruner_lib.evaluation.report import EvaluationReport, EvaluationRow, evaluate
from pruner_lib.evaluation.running import EvaluationError

__all__ = [
    "Cost",
    "EvaluationError",
    "EvaluationReport",
    "EvaluationRow",
    "Generation",
    "GenerationTable",
    "Latency",
    "LatencyTable",
    "Perplexity",
    "count_cost",
    "evaluate",
    "generate",
    "measure_latency",
    "perplexity",
]
