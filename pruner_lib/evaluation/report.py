"""Size, speed and quality of several models in one object."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pruner_lib.assets.files import write_whole
from pruner_lib.evaluation.cost import Cost
from pruner_lib.evaluation.generation import GenerationTable
from pruner_lib.evaluation.latency import LatencyTable
from pruner_lib.evaluation.memory import Memory
from pruner_lib.evaluation.perplexity import Perplexity
from pruner_lib.evaluation.running import EvaluationError
from pruner_lib.evaluation.tables import html_table, markdown_table, text_table
from pruner_lib.evaluation.zero_shot_result import Estimate, ZeroShotResult

_SCHEMA = 1
_COUNTS = ("params", "macs", "weight_bytes")
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class EvaluationRow:
    """One model.

    Attributes:
        model: its name.
        cost: what it costs.
        perplexities: data set to perplexity; empty if no text was given. Where several window lengths were
            measured the keys end in the length, ``"wikitext2 test, 1024"``.
        zero_shot: accuracies, or None.
        memory: peak memory, or None.
    """

    model: str
    cost: Cost
    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)
    zero_shot: ZeroShotResult | None = None
    memory: Memory | None = None

    @property
    def perplexity(self) -> Perplexity | None:
        """On the first data set."""
        return next(iter(self.perplexities.values()), None)


@dataclass(frozen=True)
class EvaluationReport:
    """Rows in the order the models were given; ratios are to the first.

    ``report["pruned"].cost.params`` reads one number, ``report.ratio("pruned", "macs")`` compares,
    ``report.plot()`` draws size against quality, ``report.add(latency=…)`` takes what was measured elsewhere.

    Attributes:
        rows: one per model.
        latency: times of all models, taken in one run.
        generations: what the models wrote.
    """

    rows: tuple[EvaluationRow, ...]
    latency: LatencyTable | None = None
    generations: GenerationTable | None = None

    def __getitem__(self, model: str) -> EvaluationRow:
        for row in self.rows:
            if row.model == model:
                return row
        raise EvaluationError(f"no model {model!r} in this report; it has {', '.join(self.models)}")

    @property
    def models(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(row.model for row in self.rows)

    @property
    def sources(self) -> tuple[str, ...]:
        """Data sets of the perplexities."""
        return tuple(dict.fromkeys(source for row in self.rows for source in row.perplexities))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Zero-shot tasks."""
        results = [row.zero_shot for row in self.rows if row.zero_shot is not None]
        return tuple(dict.fromkeys(task for result in results for task in result.tasks))

    def ratio(self, model: str, what: str = "params") -> float:
        """A number of one model / the first model's.

        Args:
            model: a name in the report.
            what: ``params``, ``macs``, ``weight_bytes``, ``peak_bytes``, ``average`` (zero-shot) or a data
                set of the perplexities; ``perplexity`` is the first one.

        Raises:
            EvaluationError: an unknown model or number.
        """
        return self.number(model, what) / self.number(self.rows[0].model, what)

    def number(self, model: str, what: str) -> float:
        """The number that :meth:`ratio` divides."""
        row = self[model]
        if what in _COUNTS:
            return float(getattr(row.cost, what))
        if what == "peak_bytes" and row.memory is not None:
            return float(row.memory.peak_bytes)
        if what == "average" and row.zero_shot is not None:
            return row.zero_shot.average
        source = self.sources[0] if what == "perplexity" and self.sources else what
        if source not in row.perplexities:
            known = [*_COUNTS, *self.sources]
            known += [
                name for name, there in (("peak_bytes", row.memory), ("average", row.zero_shot)) if there
            ]
            raise EvaluationError(f"{row.model} has no number {what!r}; known are {', '.join(known)}")
        return float(row.perplexities[source])

    def difference(self, model: str) -> Estimate:
        """Zero-shot average of one model − the first model's, item against item; see ``ZeroShotResult``.

        Raises:
            EvaluationError: one of the two has no zero-shot result, or on other items.
        """
        mine, first = self[model].zero_shot, self.rows[0].zero_shot
        if mine is None or first is None:
            raise EvaluationError(f"{model} or {self.rows[0].model} has no zero-shot result in this report")
        return mine.difference(first)

    def add(
        self,
        *,
        zero_shot: Mapping[str, ZeroShotResult] | None = None,
        memory: Mapping[str, Memory] | None = None,
        latency: LatencyTable | None = None,
        generations: GenerationTable | None = None,
    ) -> EvaluationReport:
        """A new report with what was measured elsewhere.

        Raises:
            EvaluationError: a result of a model that is not in the report.
        """
        rows = {row.model: row for row in self.rows}
        for name, result in (zero_shot or {}).items():
            rows[name] = replace(self[name], zero_shot=result)
        for name, found in (memory or {}).items():
            rows[name] = replace(rows[self[name].model], memory=found)
        return EvaluationReport(
            tuple(rows.values()), latency or self.latency, generations or self.generations
        )

    @classmethod
    def join(cls, reports: Sequence[EvaluationReport]) -> EvaluationReport:
        """Reports of different models as one, in their order.

        Times are those of the last report that has any: times of different runs do not compare.

        Raises:
            EvaluationError: no report, or a model in two of them.
        """
        rows = [row for report in reports for row in report.rows]
        names = [row.model for row in rows]
        if not rows or len(set(names)) < len(names):
            raise EvaluationError(f"give reports of different models; found {', '.join(names) or 'none'}")
        timed = [report.latency for report in reports if report.latency is not None]
        written = [report.generations for report in reports if report.generations is not None]
        return cls(
            tuple(rows), timed[-1] if timed else None, GenerationTable.join(written) if written else None
        )

    def _size_table(self) -> Table:
        header = ["model", "parameters", "ratio", "MACs", "ratio", "weights"]
        header += ["peak memory"] if any(row.memory for row in self.rows) else []
        header += [cell for source in self.sources for cell in (f"perplexity, {source}", "ratio")]
        return header, [self._size_cells(row) for row in self.rows]

    def _size_cells(self, row: EvaluationRow) -> list[str]:
        cost = row.cost
        cells = [row.model, _scaled(cost.params), f"{self.ratio(row.model):.3f}", _scaled(cost.macs)]
        cells += [f"{self.ratio(row.model, 'macs'):.3f}", _mebibytes(cost.weight_bytes)]
        if any(other.memory for other in self.rows):
            cells.append(_mebibytes(row.memory.peak_bytes) if row.memory else "–")
        for source in self.sources:
            both = source in row.perplexities and source in self.rows[0].perplexities
            cells.append(f"{row.perplexities[source]:.2f}" if source in row.perplexities else "–")
            cells.append(f"{self.ratio(row.model, source):.3f}" if both else "–")
        return cells

    def _accuracy_table(self) -> Table:
        """The paper's columns; the average with its standard error, and the paired change to the first."""
        titles = {
            score.task: score.title for row in self.rows if row.zero_shot for score in row.zero_shot.scores
        }
        header = ["model", *(titles[task] for task in self.tasks), "average", "± s.e.", "change", "± s.e."]
        return header, [self._accuracy_cells(row) for row in self.rows]

    def _accuracy_cells(self, row: EvaluationRow) -> list[str]:
        result = row.zero_shot
        if result is None:
            return [row.model, *("–" for _ in range(len(self.tasks) + 4))]
        values = [f"{100 * result[task].value:.2f}" if task in result.tasks else "–" for task in self.tasks]
        mean = [f"{100 * result.average:.2f}", f"{100 * result.average_stderr:.2f}"]
        try:
            change = self.difference(row.model)
        except EvaluationError:  # on other items, or the first model has none
            return [row.model, *values, *mean, "–", "–"]
        if row is self.rows[0]:
            return [row.model, *values, *mean, "", ""]
        return [row.model, *values, *mean, f"{100 * change.value:+.2f}", f"{100 * change.stderr:.2f}"]

    @property
    def conditions(self) -> str:
        """How the numbers were taken; a difference between the models' conditions is listed."""
        lines = [f"MACs at {c.batch_size} × {c.seq_len} tokens" for c in (row.cost for row in self.rows)]
        lines += [row.memory.conditions for row in self.rows if row.memory]
        lines += [p.conditions for row in self.rows for p in row.perplexities.values()]
        return "; ".join(dict.fromkeys(lines))

    @property
    def accuracy_conditions(self) -> str:
        """Harness, items, metrics and dtype of the zero-shot results."""
        lines = dict.fromkeys(row.zero_shot.conditions for row in self.rows if row.zero_shot)
        return "; ".join(["accuracy in %", *lines])

    def _sections(self) -> list[tuple[str, list[str], list[list[str]], str]]:
        """(title, header, rows, conditions) of each table that there is."""
        parts = [("Size and perplexity", *self._size_table(), self.conditions)]
        if self.tasks:
            parts.append(("Zero-shot accuracy", *self._accuracy_table(), self.accuracy_conditions))
        if self.latency is not None:
            parts.append(("Latency", *self.latency.table(), self.latency.conditions))
        return parts

    def __str__(self) -> str:
        parts = [f"{text_table(head, rows)}\n({how})" for _, head, rows, how in self._sections()]
        return "\n\n".join([*parts, *([str(self.generations)] if self.generations else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [html_table(head, rows, how) for _, head, rows, how in self._sections()]
        return "\n".join([*parts, *([self.generations._repr_html_()] if self.generations else [])])

    def to_markdown(self) -> str:
        """GitHub tables, each with its conditions below it, and headings where there are several."""
        parts = [
            (title, f"{markdown_table(head, rows)}\n\n{how}\n") for title, head, rows, how in self._sections()
        ]
        if self.generations is not None:
            parts.append(("Generations", f"{self.generations.to_markdown()}\n"))
        if len(parts) == 1:
            return parts[0][1]
        return "\n".join(f"## {title}\n\n{body}" for title, body in parts)

    def plot(self, **options: Any) -> Any:
        """Size against quality with the frontier, drawn; see ``pruner_lib.display.plot_tradeoff``."""
        from pruner_lib import display

        return display.plot_tradeoff(self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, or as Markdown if the name ends in ``.md``.

        An older file is replaced whole or not at all. Only JSON can be loaded again.
        """
        if Path(path).suffix == ".md":
            return write_whole(Path(path), self.to_markdown())
        content = {"schema": _SCHEMA, "kind": "EvaluationReport", **asdict(self)}
        return write_whole(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationReport:
        """Read the JSON that :meth:`save` wrote.

        Raises:
            EvaluationError: not such a file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["kind"] != "EvaluationReport" or content["schema"] != _SCHEMA:
                raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
            latency, generations = content.get("latency"), content.get("generations")
            return cls(
                tuple(_row_from(row) for row in content["rows"]),
                None if latency is None else LatencyTable.from_dict(latency),
                None if generations is None else GenerationTable.from_dict(generations),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path} is not an evaluation report of schema {_SCHEMA} ({type(error).__name__}: {error}); "
                "write one with EvaluationReport.save"
            ) from error


def _row_from(content: Mapping[str, Any]) -> EvaluationRow:
    zero_shot, memory = content.get("zero_shot"), content.get("memory")
    return EvaluationRow(
        content["model"],
        Cost(**content["cost"]),
        {source: Perplexity(**value) for source, value in content["perplexities"].items()},
        None if zero_shot is None else ZeroShotResult.from_dict(zero_shot),
        None if memory is None else Memory(**memory),
    )


def _scaled(count: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:,.2f} {letter}"
    return str(count)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
