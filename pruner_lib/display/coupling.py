"""Groups drawn on the matrices they run through."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner_lib.discovery import CoupledSlice, DependencyMap, GroupFamily
from pruner_lib.display.style import COLOURS, GREY, HATCHES, INK, layer_of, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_DRAWN = 8  # more matrices than this are named in the summary but not drawn
_THINNEST = 0.012  # share of a side: one row of 1536 would be too thin to see


def draw_family(
    dependencies: DependencyMap, family: str | GroupFamily, groups: int | Sequence[int] = 0
) -> Figure:
    """Every matrix a family runs through, with the slices of some groups lit up.

    Rows are dimension 0 (outputs of a linear layer), columns dimension 1 (inputs). Each group has its
    own colour and hatch; a slice too thin to see is drawn wider.

    Args:
        dependencies: what ``discover`` found.
        family: a family or its name.
        groups: one group index or several.

    Raises:
        UnknownFamilyError: no such family.
        IndexError: a group that the family does not have.
    """
    found, chosen = _resolve(dependencies, family, groups)
    pieces = found.slices[:MOST_DRAWN]
    columns = min(4, len(pieces))
    rows = ceil(len(pieces) / columns)
    figure, axes = new_figure(2.6 * columns, 2.7 * rows + 0.5, nrows=rows, ncols=columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, piece in zip(axes.flat, pieces, strict=False):
        shape = dependencies.shapes[piece.parameter]
        _draw_piece(axis, piece, shape, chosen)
        layer = layer_of(piece.parameter) if found.layer is None else None
        where = "" if layer is None else f"layer {layer}, "
        sizes = " × ".join(f"{size:,}" for size in shape)
        axis.set_title(f"{short(piece.parameter)}\n{where}{sizes}", fontsize=9)
    listed = ", ".join(map(str, chosen))
    figure.suptitle(f"{found.name}: group{'s' if len(chosen) > 1 else ''} {listed} of {found.size}")
    return figure


def describe_family(
    dependencies: DependencyMap, family: str | GroupFamily, groups: int | Sequence[int] = 0
) -> str:
    """What :func:`draw_family` shows, in one line."""
    found, chosen = _resolve(dependencies, family, groups)
    parts = [f"{short(piece.parameter)} {_count(piece, chosen)}" for piece in found.slices[:MOST_DRAWN]]
    more = f" and {len(found.slices) - MOST_DRAWN} more" if len(found.slices) > MOST_DRAWN else ""
    which = f"group {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} groups"
    return f"{found.name}, {which} of {found.size}: {', '.join(parts)}{more}."


def _count(piece: CoupledSlice, groups: Sequence[int]) -> str:
    number = len(piece.of(groups))
    return f"{number} {('row', 'column')[piece.dim] if piece.dim < 2 else 'index'}{'s' * (number != 1)}"


def _resolve(
    dependencies: DependencyMap, family: str | GroupFamily, groups: int | Sequence[int]
) -> tuple[GroupFamily, tuple[int, ...]]:
    found = dependencies.family(family if isinstance(family, str) else family.name)
    chosen = (groups,) if isinstance(groups, int) else tuple(groups)
    if not chosen or min(chosen) < 0 or max(chosen) >= found.size:
        raise IndexError(f"{found.name} has groups 0 to {found.size - 1}; asked for {list(chosen)}")
    return found, chosen


def _draw_piece(axis: Any, piece: CoupledSlice, shape: tuple[int, ...], groups: tuple[int, ...]) -> None:
    """One matrix, its sides drawn as the square root of its sizes so that long ones stay readable."""
    from matplotlib.patches import Rectangle

    tall = sqrt(shape[0])
    wide = sqrt(shape[1]) if len(shape) > 1 else tall / 12
    axis.add_patch(Rectangle((0, 0), wide, tall, facecolor=GREY, edgecolor=INK, linewidth=0.8))
    along = tall if piece.dim == 0 else wide
    for place, group in enumerate(groups):
        colour, hatch = COLOURS[place % len(COLOURS)], HATCHES[place % len(HATCHES)]
        for start, stop in runs(piece.of([group]), shape[piece.dim]):
            thick = max((stop - start) * along, _THINNEST * along)
            first = min(start * along, along - thick)
            box = ((0, first), wide, thick) if piece.dim == 0 else ((first, 0), thick, tall)
            axis.add_patch(Rectangle(*box, facecolor=colour, edgecolor=INK, linewidth=0.3, hatch=hatch))
    side = max(tall, wide) * 1.02
    axis.set(xlim=(-0.02 * side, side), ylim=(side, -0.02 * side), aspect="equal")


def runs(indices: np.ndarray, size: int) -> list[tuple[float, float]]:
    """Sorted indices as runs of neighbours, in shares of the dimension's size."""
    breaks = np.flatnonzero(np.diff(indices) > 1) + 1
    return [(run[0] / size, (run[-1] + 1) / size) for run in np.split(indices, breaks)]
