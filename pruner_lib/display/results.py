"""What cutting and recovery did, drawn: criteria, learning curves, size against quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner_lib.display.style import COLOURS, HATCHES, INK, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]


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


def plot_tradeoff(points: Any, *, xlabel: str = "parameters (million)", ylabel: str = "perplexity") -> Figure:
    """Size against quality, one labelled marker per model.

    Args:
        points: an ``EvaluationReport`` with a perplexity, or name to (size, quality) with the size
            already in the unit of ``xlabel``.
        xlabel: of the size.
        ylabel: of the quality.
    """
    figure, axes = new_figure(6, 3.8)
    for place, (name, size, quality) in enumerate(_pairs(points)):
        axes.scatter(size, quality, s=70, c=COLOURS[place % 7], marker=MARKERS[place % 7], edgecolors=INK)
        axes.annotate(name, (size, quality), xytext=(7, 5), textcoords="offset points")
    axes.set_yscale("log")
    axes.margins(0.2)
    tidy(axes, xlabel=xlabel, ylabel=ylabel)
    return figure


def describe_tradeoff(points: Any) -> str:
    """What :func:`plot_tradeoff` shows, in one line: orderings by size and by quality."""
    pairs = list(_pairs(points))
    by_size = [name for name, _, _ in sorted(pairs, key=lambda p: p[1])]
    by_quality = [name for name, _, _ in sorted(pairs, key=lambda p: p[2])]
    return f"From small to large: {', '.join(by_size)}; from low to high perplexity: {', '.join(by_quality)}."


def _pairs(points: Any) -> Iterable[tuple[str, float, float]]:
    if isinstance(points, Mapping):
        return [(name, float(size), float(quality)) for name, (size, quality) in points.items()]
    return [(row.model, row.cost.params / 1e6, float(row.perplexity)) for row in points.rows]
