"""Colours, hatches and markers that every figure shares, and figures that no global state holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any of the common colour-vision deficiencies.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++")
GREY = "#D9D9D9"
INK = "#222222"

_LAYERED = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def new_figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure and its axes, made without pyplot: it is shown when a cell returns it, and only once.

    Args:
        width: inches.
        height: inches.
        **grid: as for ``Figure.subplots``.
    """
    from pruner_lib.display.drawing import Drawing

    figure = Drawing(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**grid)
    return figure, axes


def tidy(axes: Any, *, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Labels, and only the two spines that carry a scale."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def layer_of(name: str) -> int | None:
    """The layer number in the name of a family or parameter, or None: ``layers.5.mlp_neuron`` is 5."""
    found = _LAYERED.search(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """The kind at the end of a family's name: ``layers.5.mlp_neuron`` is ``mlp_neuron``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1]


def short(parameter: str) -> str:
    """The last two parts of a parameter's name, ``.weight`` dropped: ``mlp.gate_proj``."""
    return ".".join(parameter.removesuffix(".weight").split(".")[-2:])
