"""Plans and sensitivity scans, drawn before anything is cut."""

from __future__ import annotations

from math import nan, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner_lib.discovery.units import layer_of_unit
from pruner_lib.display.style import COLOURS, GREY, INK, MARKERS, layer_of, new_figure, tidy
from pruner_lib.pruning import PruningPlan, Sensitivity
from pruner_lib.pruning.plan_text import dropped_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_plan(plan: PruningPlan) -> Figure:
    """Parameters that each layer keeps and loses (bars), and groups kept per kind (markers).

    A kind that spans all layers (hidden channels) is a level line. A dropped layer has no bar left; what
    is dropped whole, layer, attention or MLP, has a cross at the foot instead of a point on its kind's line.
    """
    before, after = layer_params(plan)
    layers = np.arange(len(before))
    figure, (bars, lines) = new_figure(9, 3.4, ncols=2)
    bars.bar(layers, after / 1e6, color=COLOURS[0], label="kept")
    gone = (before - after) / 1e6
    bars.bar(layers, gone, bottom=after / 1e6, color=GREY, edgecolor=INK, hatch="///", label="removed")
    tidy(bars, title="parameters of each layer", xlabel="layer", ylabel="million")
    _legend_below(bars)
    kinds = list(dict.fromkeys(plan.dependencies.family(n).kind for n in plan.removal))
    for place, kind in enumerate(kinds):
        # Lines that coincide stay told apart: the later one is thinner, its markers smaller.
        behind = len(kinds) - 1 - place
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7], "label": kind}
        where, share = _kept_shares(plan, kind, len(before))
        lines.plot(where, share, markersize=4 + 2 * behind, linewidth=1.5 + 1.5 * behind, **style)
    units = {layer_of_unit(unit): 2 for unit in plan.dropped}
    if units:
        lines.plot(*zip(*units.items(), strict=True), "x", color=INK, label="dropped whole")
    lines.set_xlim(bars.get_xlim())
    lines.set_ylim(0, 105)
    tidy(lines, title="groups kept", xlabel="layer", ylabel="%")
    if kinds or units:
        _legend_below(lines)
    return figure


def _legend_below(axes: Any) -> None:
    """Under the axes, where it covers no data."""
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _kept_shares(plan: PruningPlan, kind: str, num_layers: int) -> tuple[list[int], list[float]]:
    """Layers, and the share of the kind's groups that each keeps, in per cent; NaN where none is left."""
    where: list[int] = []
    share: list[float] = []
    for family in plan.dependencies.select(kind=kind):
        layers = range(num_layers) if family.layer is None else [family.layer]
        where += layers
        share += [100 * plan.kept_sizes[family.name] / family.size or nan] * len(layers)
    return where, share


def describe_plan(plan: PruningPlan) -> str:
    """What :func:`plot_plan` shows, in one line."""
    before, after = layer_params(plan)
    touched = int((after < before).sum())
    share = 100 * plan.num_params_removed / plan.params_before
    dropped = f", {dropped_in_words(plan)} dropped whole" if plan.dropped else ""
    return (
        f"{touched} of {len(before)} layers lose parameters{dropped}; {plan.params_after:,} of "
        f"{plan.params_before:,} remain ({share:.1f} % removed)."
    )


def layer_params(plan: PruningPlan) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of every layer before and after, from shapes alone."""
    count = max(1, plan.dependencies.num_layers)
    totals = np.zeros((2, count))
    for row, shapes in enumerate((plan.dependencies.shapes, plan.new_shapes())):
        for name, shape in shapes.items():
            layer = layer_of(name)
            outside = name in plan.dependencies.aliases or name in plan.dependencies.buffers
            if layer is not None and layer < count and not outside:
                totals[row, layer] += prod(shape)
    return totals[0], totals[1]


def plot_sensitivity(scan: Sensitivity, *, limit: float | None = None) -> Figure:
    """Perplexity over dense when each layer alone is pruned, one curve per kind; proposed layers shaded.

    Args:
        scan: what ``scan_sensitivity`` measured.
        limit: as for ``Sensitivity.propose``.
    """
    figure, axes = new_figure(7, 3.4)
    proposed = scan.propose(limit)
    axes.axvspan(proposed.start - 0.5, proposed.stop - 0.5, color=GREY, alpha=0.5, label="proposed layers")
    for place, (name, values) in enumerate(scan.perplexity.items()):
        points = [(layer, value / scan.dense) for layer, value in enumerate(values) if value is not None]
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7], "markersize": 4, "label": name}
        axes.plot(*zip(*points, strict=True), **style) if points else None
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    title = f"each layer alone without {scan.ratio:.0%} of its groups"
    tidy(axes, title=title, xlabel="layer", ylabel="perplexity / dense (log scale)")
    axes.legend(frameon=False)
    return figure


def describe_sensitivity(scan: Sensitivity, *, limit: float | None = None) -> str:
    """What :func:`plot_sensitivity` shows, in one line."""
    rises, proposed = scan.rises(), scan.propose(limit)
    worst = max(range(len(rises)), key=lambda layer: rises[layer])
    sensitive = scan.sensitive(limit)
    listed = ", ".join(map(str, sensitive)) or "none"
    return (
        f"Layer {worst} is the most sensitive ({rises[worst]:.1f} times the dense perplexity); sensitive "
        f"layers: {listed}; layers to prune: {proposed.start} to {proposed.stop - 1}."
    )
