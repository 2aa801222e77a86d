"""What cutting and recovery did, drawn: criteria, learning curves, size against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner_lib.display.style import COLOURS, GREY, HATCHES, INK, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
# Sizes that a report knows: the label, and what one of its units is.
SIZES = {
    "params": ("parameters (million)", 1e6),
    "macs": ("multiply-accumulates (G)", 1e9),
    "weight_bytes": ("weights (MiB)", 2**20),
    "peak_bytes": ("peak memory (MiB)", 2**20),
}


def plot_criteria(perplexities: Mapping[str, float], *, dense: float | None = None) -> Figure:
    """One bar per criterion on a logarithmic scale, the dense model as a line; lower is better.

    Args:
        perplexities: name to perplexity (anything ``float`` accepts).
        dense: the unpruned model's.
    """
    names, values = list(perplexities), [float(value) for value in perplexities.values()]
    figure, axes = new_figure(1.6 + 1.2 * len(names), 3.6)
    for place, value in enumerate(values):
        axes.bar(place, value, color=COLOURS[place % 7], edgecolor=INK, hatch=HATCHES[place % 7])
        axes.annotate(f"{value:,.0f}", (place, value), ha="center", va="bottom")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names)
    if dense is not None:
        axes.axhline(float(dense), color=INK, linestyle="--", label=f"dense, {float(dense):,.0f}")
        axes.legend(frameon=False)
    tidy(axes, ylabel="perplexity (log scale, lower is better)")
    return figure


def describe_criteria(perplexities: Mapping[str, float], *, dense: float | None = None) -> str:
    """What :func:`plot_criteria` shows, in one line: an ordering and ratios to the dense model."""
    ordered = sorted(perplexities, key=lambda name: float(perplexities[name]))
    line = f"From best to worst: {', '.join(ordered)}"
    if dense is None:
        return f"{line}."
    best, worst = (float(perplexities[name]) / float(dense) for name in (ordered[0], ordered[-1]))
    return f"{line}; the best is {best:.1f} times the dense perplexity, the worst {worst:.0f} times."


def plot_learning_curve(histories: History | Mapping[str, History]) -> Figure:
    """Training loss per step, one curve per run.

    Args:
        histories: ``RecoveryResult.history``, or several by name. Records hold ``step`` and ``loss``.
    """
    figure, axes = new_figure(6.4, 3.4)
    for place, (name, history) in enumerate(_by_name(histories).items()):
        steps, losses = _points(history)
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7], "markersize": 4}
        axes.plot(steps, losses, label=name, **style)
    tidy(axes, title="recovery", xlabel="optimizer step", ylabel="training loss (nats per token)")
    if isinstance(histories, Mapping):
        axes.legend(frameon=False)
    return figure


def describe_learning_curve(histories: History | Mapping[str, History]) -> str:
    """What :func:`plot_learning_curve` shows, in one line: mean loss of the first and last quarter."""
    parts = []
    for name, history in _by_name(histories).items():
        losses = _points(history)[1]
        quarter = max(1, len(losses) // 4)
        first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
        direction = "falls" if last < first else "does not fall"
        parts.append(f"{name}: over {len(losses)} steps the loss {direction}, {first:.1f} to {last:.1f}")
    return "; ".join(parts) + "."


def _by_name(histories: History | Mapping[str, History]) -> dict[str, History]:
    return dict(histories) if isinstance(histories, Mapping) else {"LoRA": histories}


def _points(history: History) -> tuple[list[int], list[float]]:
    kept = [record for record in history if "loss" in record]
    return [record.get("step", place + 1) for place, record in enumerate(kept)], [r["loss"] for r in kept]


def plot_tradeoff(
    points: Any,
    *,
    quality: str = "perplexity",
    size: str = "params",
    xlabel: str | None = None,
    ylabel: str | None = None,
) -> Figure:
    """Size against quality, one labelled marker per model, and the frontier as a line.

    A model is on the frontier when no other is at least as small and better.

    Args:
        points: an ``EvaluationReport`` with that quality, or name to (size, quality) with the size
            already in the unit of ``xlabel``.
        quality: of a report: ``perplexity`` (the first data set's), a data set, or ``average``, the
            zero-shot accuracy, drawn in % with its standard error. Of ``average`` higher is better.
        size: of a report: ``params``, ``macs``, ``weight_bytes`` or ``peak_bytes``.
        xlabel: of the size; its name and unit if None, parameters in millions for a mapping.
        ylabel: of the quality.
    """
    figure, axes = new_figure(6, 3.8)
    pairs = _pairs(points, quality, size)
    edge = _frontier(pairs, quality)
    axes.plot([p[1] for p in edge], [p[2] for p in edge], color=GREY, linewidth=3, zorder=0, label="frontier")
    for place, (name, across, value) in enumerate(pairs):
        style: dict[str, Any] = {"marker": MARKERS[place % 7], "color": COLOURS[place % 7]}
        axes.errorbar(
            across, value, yerr=_error(points, name, quality), markersize=9, markeredgecolor=INK, **style
        )
        axes.annotate(name, (across, value), xytext=(7, 5), textcoords="offset points")
    if quality != "average":
        axes.set_yscale("log")
    axes.margins(0.2)
    if len(edge) > 1:
        axes.legend(frameon=False, loc="best")
    xlabel = xlabel or SIZES[size][0]
    tidy(axes, xlabel=xlabel, ylabel=ylabel or ("zero-shot average (%)" if quality == "average" else quality))
    return figure


def describe_tradeoff(points: Any, *, quality: str = "perplexity", size: str = "params") -> str:
    """What :func:`plot_tradeoff` shows, in one line: orderings by size and by quality, and the frontier."""
    pairs = _pairs(points, quality, size)
    by_size = [name for name, _, _ in sorted(pairs, key=lambda p: p[1])]
    by_quality = [name for name, _, _ in sorted(pairs, key=lambda p: p[2])]
    edge = frontier(points, quality=quality, size=size)
    what = "zero-shot average" if quality == "average" else "perplexity"
    return (
        f"From small to large: {', '.join(by_size)}; from low to high {what}: {', '.join(by_quality)}; on "
        f"the frontier: {', '.join(edge)}."
    )


def frontier(points: Any, *, quality: str = "perplexity", size: str = "params") -> list[str]:
    """Models that no other one beats in size or quality without losing in the other, from small to large."""
    return [name for name, _, _ in _frontier(_pairs(points, quality, size), quality)]


def _pairs(points: Any, quality: str, size: str) -> list[tuple[str, float, float]]:
    """(name, size, quality), in the order given."""
    if isinstance(points, Mapping):
        return [(name, float(size), float(value)) for name, (size, value) in points.items()]
    scale = 100 if quality == "average" else 1
    unit = SIZES[size][1]
    return [
        (name, points.number(name, size) / unit, scale * points.number(name, quality))
        for name in points.models
    ]


def _frontier(pairs: Sequence[tuple[str, float, float]], quality: str) -> list[tuple[str, float, float]]:
    """What no other model beats in one of the two without losing in the other, from small to large."""
    sign = -1.0 if quality == "average" else 1.0

    def beaten(size: float, value: float) -> bool:
        return any(
            other_size <= size and sign * other <= sign * value and (other_size, other) != (size, value)
            for _, other_size, other in pairs
        )

    return sorted((pair for pair in pairs if not beaten(*pair[1:])), key=lambda pair: pair[1])


def _error(points: Any, name: str, quality: str) -> float | None:
    """Standard error of an accuracy, in %."""
    if quality != "average" or isinstance(points, Mapping):
        return None
    return 100 * float(points[name].zero_shot.average_stderr)


def plot_latency(table: Any) -> Figure:
    """Measured time to the first token against what the multiply-accumulates promise, as ratios.

    Args:
        table: a ``LatencyTable``. On the line a smaller model is as much faster as it does less work; above
            it, less so.
    """
    figure, axes = new_figure(5.2, 3.8)
    names = list(dict.fromkeys(row.model for row in table.rows))
    for place, name in enumerate(names):
        rows = [row for row in table.rows if row.model == name]
        axes.scatter(
            [row.macs_ratio for row in rows],
            [row.first_token_ratio for row in rows],
            s=60, c=COLOURS[place % 7], marker=MARKERS[place % 7], edgecolors=INK, label=name,
        )  # fmt: skip
    ends = (min([row.macs_ratio for row in table.rows]) * 0.95, 1.02)
    axes.plot(ends, ends, color=INK, linestyle="--", label="time follows MACs")
    axes.legend(frameon=False)
    tidy(axes, xlabel="MACs / those of the first model", ylabel="time to first token / the first model's")
    return figure


def describe_latency(table: Any) -> str:
    """What :func:`plot_latency` shows, in one line; measured, so not for a checked cell."""
    first = table.rows[0].model
    parts = [
        f"{row.model} at {row.batch_size} × {row.prompt_len}: {row.first_token_ratio:.2f} of the time, "
        f"{row.macs_ratio:.2f} of the MACs"
        for row in table.rows
        if row.model != first
    ]
    return f"Against {first}: {'; '.join(parts)}." if parts else f"Only {first} was timed."
