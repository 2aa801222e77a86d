"""A figure that shows itself in a notebook; imported only when something is drawn."""

from __future__ import annotations

import base64
import io
from html import escape

from matplotlib.figure import Figure


class Drawing(Figure):
    """A matplotlib figure outside pyplot: a cell that returns it shows it once, whatever the backend."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def png_bytes(figure: Figure, dpi: int = 90) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def image_tag(figure: Figure, alt: str) -> str:
    """The figure as an HTML image with alternative text, the file inside the tag."""
    data = base64.b64encode(png_bytes(figure)).decode("ascii")
    return f'<img alt="{escape(alt)}" style="max-width:100%" src="data:image/png;base64,{data}">'
