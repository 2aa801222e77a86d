"""Accuracies with their conditions and standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruner_lib.evaluation.running import EvaluationError
from pruner_lib.evaluation.tables import html_table, markdown_table, text_table
from pruner_lib.evaluation.tasks import TASK_TITLES


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both as fractions. ``float(e)`` gives the number."""

    value: float
    stderr: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} ± {100 * self.stderr:.2f} %"


@dataclass(frozen=True)
class TaskScore:
    """What one model scored on one task.

    Attributes:
        task: the harness's name.
        metric: which of ``metrics`` enters averages: the paper's for its seven tasks, for others
            ``acc_norm`` where there is one, else the first.
        metrics: each metric of the harness with its standard error (s / √n over the items).
        num_items: items that were scored.
        num_items_total: items the split has.
        dataset: where the items are from.
        split: of the data set.
        truncated: items whose context was cut to fit the model.
        per_item: the metric of each item, in the order of the data set; empty where the metric is no
            mean over items.
    """

    task: str
    metric: str
    metrics: Mapping[str, Estimate]
    num_items: int
    num_items_total: int
    dataset: str
    split: str
    truncated: int = 0
    per_item: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """The metric that enters averages, from 0 to 1."""
        return self.metrics[self.metric].value

    @property
    def stderr(self) -> float:
        """Its standard error."""
        return self.metrics[self.metric].stderr

    @property
    def title(self) -> str:
        """The task as the paper's columns call it."""
        return TASK_TITLES.get(self.task, self.task)


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores of one model, task by task. ``result["piqa"].value`` reads one, ``result.average`` the mean.

    Attributes:
        scores: in the order asked for.
        data: ``package`` or ``hub``.
        dtype: of the computation.
        harness: version of lm-eval.
        seed: of the drawn items; None if they are the first ones of each split.
    """

    scores: tuple[TaskScore, ...]
    data: str
    dtype: str
    harness: str
    seed: int | None = None

    def __getitem__(self, task: str) -> TaskScore:
        for score in self.scores:
            if score.task == task:
                return score
        raise EvaluationError(f"no task {task!r} in this result; it has {', '.join(self.tasks)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(score.task for score in self.scores)

    @property
    def average(self) -> float:
        """Mean of the tasks' values, each task counting once whatever its size, as in the paper."""
        return sum(score.value for score in self.scores) / len(self.scores)

    @property
    def average_stderr(self) -> float:
        """√(Σ stderr²) / number of tasks: the tasks' errors are independent."""
        return math.sqrt(sum(score.stderr**2 for score in self.scores)) / len(self.scores)

    def difference(self, other: ZeroShotResult) -> Estimate:
        """This average − the other's, item against item.

        Both models answered the same items, so most of the chance in which items were drawn cancels:
        with d_i the difference at item i of a task with n items, the task contributes mean(d) with variance
        var(d) / n. The standard error is smaller than that of two independent runs.

        Raises:
            EvaluationError: the two were not scored on the same tasks and items.
        """
        if set(self.tasks) != set(other.tasks):
            raise EvaluationError(
                f"the averages are over different tasks: {', '.join(self.tasks)} against "
                f"{', '.join(other.tasks)}; score both models on the same tasks"
            )
        total, variance = 0.0, 0.0
        for score in self.scores:
            theirs = other[score.task]
            same = (score.metric, score.dataset, score.split, len(score.per_item), self.seed)
            if same != (theirs.metric, theirs.dataset, theirs.split, len(theirs.per_item), other.seed):
                raise EvaluationError(
                    f"task {score.task!r} was not scored on the same items: {len(score.per_item)} of "
                    f"{score.dataset}, {score.split} by {score.metric} (seed {self.seed}) against "
                    f"{len(theirs.per_item)} of {theirs.dataset}, {theirs.split} by {theirs.metric} "
                    f"(seed {other.seed})"
                )
            gaps = [mine - yours for mine, yours in zip(score.per_item, theirs.per_item, strict=True)]
            if len(gaps) < 2:
                raise EvaluationError(f"task {score.task!r} has no item-by-item scores to compare")
            mean = sum(gaps) / len(gaps)
            total += mean
            variance += sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps)
        return Estimate(total / len(self.scores), math.sqrt(variance) / len(self.scores))

    @property
    def conditions(self) -> str:
        """Harness, items, metrics and dtype in one line."""
        parts = [
            f"{score.title} {score.metric} {score.split} {score.num_items:,}/{score.num_items_total:,}"
            + (f" ({score.truncated} truncated)" if score.truncated else "")
            for score in self.scores
        ]
        drawn = f"drawn with seed {self.seed}" if self.seed is not None else "the first of each split"
        whole = all(score.num_items == score.num_items_total for score in self.scores)
        return (
            f"lm-eval {self.harness}, {self.data} data, {self.dtype}, zero-shot; "
            f"items{'' if whole else f' ({drawn})'}: {', '.join(parts)}"
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["task", "metric", "accuracy %", "± s.e.", "acc %", "acc_norm %", "items"]
        rows = [
            [
                score.title, score.metric, f"{100 * score.value:.2f}", f"{100 * score.stderr:.2f}",
                *(_percent(score.metrics.get(name)) for name in ("acc", "acc_norm")),
                f"{score.num_items:,}",
            ]
            for score in self.scores
        ]  # fmt: skip
        mean = ["average", "", f"{100 * self.average:.2f}", f"{100 * self.average_stderr:.2f}", "", ""]
        return header, [*rows, [*mean, f"{sum(score.num_items for score in self.scores):,}"]]

    def __str__(self) -> str:
        return f"{text_table(*self._table())}\n({self.conditions})"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table(), self.conditions)

    def to_markdown(self) -> str:
        """A GitHub table with the conditions below it."""
        return f"{markdown_table(*self._table())}\n\n{self.conditions}\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ZeroShotResult:
        """The inverse of ``dataclasses.asdict``.

        Raises:
            KeyError, TypeError: not such a mapping.
        """
        scores: Sequence[Mapping[str, Any]] = content["scores"]
        return cls(**{**content, "scores": tuple(_score_from(score) for score in scores)})


def _score_from(content: Mapping[str, Any]) -> TaskScore:
    metrics = {name: Estimate(**value) for name, value in content["metrics"].items()}
    return TaskScore(**{**content, "metrics": metrics, "per_item": tuple(content["per_item"])})


def _percent(value: Estimate | None) -> str:
    return "–" if value is None else f"{100 * value.value:.2f}"
