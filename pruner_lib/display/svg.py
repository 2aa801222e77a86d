"""Small pictures as SVG: drawn in a millisecond, sharp on a projector, and able to take clicks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from pruner_lib.discovery import CoupledSlice, DependencyMap, GroupFamily
from pruner_lib.display.coupling import MOST_DRAWN, runs
from pruner_lib.display.style import COLOURS, GREY, INK, layer_of, short

_SIDE = 170.0  # the longest side of a drawn matrix, in pixels
_POWER = 0.3  # sides go as this power of the sizes, so that 576 rows can be seen beside 49,152
_THINNEST = 2.5  # a slice of one row is drawn this thick
_FONT = 'font-family="sans-serif" font-size="13"'

# A click on a drawn matrix sets the panel's text field to "number of the matrix:share of its side", as if it
# were typed; the kernel finds the group. Where a page runs no such handlers the sliders do the same.
_CLICK = (
    "const b=this.getBoundingClientRect(),s={share};"
    "const f=this.closest('.pruner-lab').querySelector('.pruner-lab-picked input');"
    "f.value='{place}:'+s.toFixed(6);"
    "f.dispatchEvent(new Event('input',{{bubbles:true}}));"
    "f.dispatchEvent(new Event('change',{{bubbles:true}}))"
)
_SHARE = ("(event.clientY-b.top)/b.height", "(event.clientX-b.left)/b.width")


def coupling_svg(dependencies: DependencyMap, family: GroupFamily, group: int, alt: str) -> str:
    """The matrices of a family with the slices of one group lit; each takes clicks.

    Args:
        dependencies: what ``discover`` found.
        family: one of its families.
        group: the group to light.
        alt: what the picture shows, in words.
    """
    drawn = [(piece, dependencies.shapes[piece.parameter]) for piece in family.slices[:MOST_DRAWN]]
    scale = _SIDE / max(max(shape) for _, shape in drawn) ** _POWER
    figures = "".join(
        _matrix(place, piece, shape, group, scale, named=family.layer is None)
        for place, (piece, shape) in enumerate(drawn)
    )
    more = len(family.slices) - len(drawn)
    note = f'<p style="flex-basis:100%">… and {more} more.</p>' if more > 0 else ""
    return (
        f'<div role="img" aria-label="{escape(alt)}" style="display:flex;flex-wrap:wrap;gap:18px;'
        f'align-items:flex-end;background:white;color:{INK};padding:8px">{figures}{note}</div>'
    )


def _matrix(
    place: int, piece: CoupledSlice, shape: tuple[int, ...], group: int, scale: float, *, named: bool
) -> str:
    """One matrix with the lit slice, what it is above it."""
    high = scale * shape[0] ** _POWER
    wide = scale * shape[1] ** _POWER if len(shape) > 1 else 14.0
    along = high if piece.dim == 0 else wide
    lit = []
    for start, stop in runs(piece.of([group]), shape[piece.dim]):
        thick = max((stop - start) * along, _THINNEST)
        first = min(start * along, along - thick)
        box = (0.0, first, wide, thick) if piece.dim == 0 else (first, 0.0, thick, high)
        lit.append(
            '<rect class="lit" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '.format(*box)
            + f'fill="{COLOURS[5]}" stroke="{INK}" stroke-width="0.4"/>'
        )
    which = ("row", "column")[piece.dim] if piece.dim < 2 else "index"
    click = _CLICK.format(place=place, share=_SHARE[min(piece.dim, 1)])
    layer = layer_of(piece.parameter) if named else None
    where = "" if layer is None else f"layer {layer}, "
    sizes = " × ".join(f"{size:,}" for size in shape)
    return (
        f'<figure style="margin:0;font-size:14px"><figcaption><b>{escape(short(piece.parameter))}</b><br>'
        f"{where}{sizes}<br>{_which(piece.of([group]), which)}</figcaption>"
        f'<svg width="{wide:.0f}" height="{high:.0f}" viewBox="0 0 {wide:.1f} {high:.1f}" '
        f'style="cursor:pointer;overflow:visible" onclick="{escape(click)}">'
        f"<title>Click a {which} to see what goes with it</title>"
        f'<rect width="{wide:.1f}" height="{high:.1f}" fill="{GREY}" stroke="{INK}"/>{"".join(lit)}'
        "</svg></figure>"
    )


def _which(indices: np.ndarray, word: str) -> str:
    """``row 7``, ``columns 64 to 127``, ``9 rows from 3 to 515``."""
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == 1:
        return f"{word} {first}"
    plural = "indices" if word == "index" else f"{word}s"
    if last - first + 1 == len(indices):
        return f"{plural} {first} to {last}"
    return f"{len(indices)} {plural} from {first} to {last}"


def scaled(value: float, base: float = 1e3) -> tuple[float, str]:
    """What one unit is and its letter, so that the value has one to three digits before the point.

    >>> scaled(135_000_000)
    (1000000.0, 'M')
    """
    powers = [
        (base**power, letter) for power, letter in ((3, "G"), (2, "M"), (1, "k" if base == 1e3 else "K"))
    ]
    return next((pair for pair in powers if value >= pair[0]), (1.0, ""))


def bars_svg(kept: Sequence[float], before: Sequence[float], alt: str) -> str:
    """One bar per layer: what stays, filled, below what goes, hatched.

    Args:
        kept: numbers of parameters, per layer.
        before: the same, at least as many.
        alt: what the picture shows, in words.
    """
    wide, high, left, foot = 720.0, 190.0, 64.0, 40.0
    step = (wide - left) / max(1, len(before))
    top = max(before, default=0.0) or 1.0
    unit, letter = scaled(top)
    parts = [_scale(top / unit, wide, high, left, letter)]
    every = max(1, len(before) // 15)
    for layer, (stays, all_) in enumerate(zip(kept, before, strict=True)):
        x, broad, whole, low = left + (layer + 0.1) * step, 0.8 * step, high * all_ / top, high * stays / top
        said = f"<title>layer {layer}: {stays / unit:.2f} of {all_ / unit:.2f} {letter} stay</title>"
        parts.append(
            f'<g>{said}<rect x="{x:.1f}" y="{high - whole:.1f}" width="{broad:.1f}" height="{whole:.1f}" '
            f'fill="url(#pruner-lab-gone)" stroke="{INK}" stroke-width="0.6"/>'
            f'<rect class="kept" x="{x:.1f}" y="{high - low:.1f}" width="{broad:.1f}" '
            f'height="{low:.1f}" fill="{COLOURS[0]}"/></g>'
        )
        if layer % every == 0:
            middle = f'x="{x + broad / 2:.1f}" y="{high + 16:.0f}" text-anchor="middle"'
            parts.append(f"<text {middle} {_FONT}>{layer}</text>")
    parts.append(
        f'<text x="{(wide + left) / 2:.0f}" y="{high + 34:.0f}" text-anchor="middle" {_FONT}>'
        "layer (filled: stays, hatched: goes)</text>"
    )
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 -12 {wide:.0f} {high + foot + 12:.0f}" '
        f'style="background:white;width:100%;max-width:{wide:.0f}px" fill="{INK}">{_HATCH}'
        f"{''.join(parts)}</svg>"
    )


_HATCH = (
    '<defs><pattern id="pruner-lab-gone" width="6" height="6" patternUnits="userSpaceOnUse" '
    f'patternTransform="rotate(45)"><rect width="6" height="6" fill="{GREY}"/>'
    f'<line x1="0" y1="0" x2="0" y2="6" stroke="{INK}" stroke-width="1.6"/></pattern></defs>'
)


def _scale(top: float, wide: float, high: float, left: float, letter: str) -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        y, mark = high * (1 - share), f"{share * top:.3g} {letter}"
        lines.append(
            f'<line x1="{left}" x2="{wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GREY}"/>'
            f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" {_FONT}>{mark}</text>'
        )
    return "".join(lines)
