"""The dashboard of an evaluation: one size against one quality, as a table and with the frontier."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from pruner_lib.display.drawing import image_tag
from pruner_lib.display.results import SIZES, describe_tradeoff, frontier, plot_tradeoff
from pruner_lib.display.widgets.panel import Choices, Panel, buttons, choice, table
from pruner_lib.evaluation.running import EvaluationError

if TYPE_CHECKING:
    from pruner_lib.evaluation import EvaluationReport


class EvaluationDashboard(Panel):
    """See :func:`evaluation_dashboard`."""

    def __init__(self, report: EvaluationReport) -> None:
        self._report = report
        qualities = [(f"perplexity, {source}", source) for source in report.sources]
        if any(row.zero_shot for row in report.rows):
            qualities.append(("zero-shot average (%)", "average"))
        if not qualities:
            raise EvaluationError(
                "this report has no quality to show: evaluate with text=… for perplexities or tasks=… for "
                "zero-shot accuracies"
            )
        sizes = [(label, name) for name, (label, _) in SIZES.items() if name != "peak_bytes"]
        sizes += [(SIZES["peak_bytes"][0], "peak_bytes")] if any(row.memory for row in report.rows) else []
        super().__init__(
            {
                "quality": choice("Quality", qualities, qualities[0][1]),
                "size": choice("Size", sizes, "params"),
                "numbers": buttons("Numbers", ["measured", "ratio to the first"], "measured"),
                "models": Choices("Models", report.models, report.models),
            },
            name="dashboard",
        )
        self.follow(self.quality, self.size, self.numbers, self.models)

    @property
    def shown(self) -> EvaluationReport:
        """The report of the ticked models that have both numbers."""
        rows = []
        for row in self._report.rows:
            if row.model in self.models.value:
                try:
                    self._report.number(row.model, self.quality.value)
                    self._report.number(row.model, self.size.value)
                except EvaluationError:  # this model was not measured so
                    continue
                rows.append(row)
        if not rows:
            raise EvaluationError("tick at least one model that was measured so")
        return replace(self._report, rows=tuple(rows))

    def show(self) -> None:
        shown, quality, size = self.shown, self.quality.value, self.size.value
        chosen = {"quality": quality, "size": size}
        line = describe_tradeoff(shown, **chosen)
        left_out = [name for name in self.models.value if name not in shown.models]
        without = f" Not measured so: {escape(', '.join(left_out))}." if left_out else ""
        self.say(f"{escape(line)}{without}{self._table(shown, quality, size)}")
        self.picture.value = image_tag(plot_tradeoff(shown, **chosen, ylabel=self.quality.label), line)

    def _table(self, shown: EvaluationReport, quality: str, size: str) -> str:
        edge = frontier(shown, quality=quality, size=size)
        units = {size: SIZES[size][1], quality: 0.01 if quality == "average" else 1.0}
        relative = self.numbers.value != "measured"

        def number(model: str, what: str) -> str:
            if relative:
                return f"{shown.ratio(model, what):.3f}"
            return f"{shown.number(model, what) / units[what]:,.2f}"

        rows = [
            [escape(name), "✔ frontier" if name in edge else "", number(name, size), number(name, quality)]
            for name in shown.models
        ]
        labels = {value: label for label, value in (*self.quality.options, *self.size.options)}
        header = ["model", "", escape(labels[size]), escape(labels[quality])]
        first = f"<br>Ratios to {escape(shown.models[0])}." if relative else ""
        conditions = shown.accuracy_conditions if quality == "average" else shown.conditions
        return f"{table(header, rows, numbers=2)}<small>{escape(conditions)}{first}</small>"


def evaluation_dashboard(report: EvaluationReport) -> EvaluationDashboard:
    """Choose a size and a quality: the table of all models and the frontier between the two.

    Controls: ``quality``, ``size``, ``numbers`` (as measured, or as ratios to the first ticked model),
    ``models``. What is shown is in ``shown``.

    Args:
        report: what ``evaluate`` returned, with perplexities or zero-shot accuracies.

    Raises:
        EvaluationError: a report with neither.
    """
    return EvaluationDashboard(report)
