"""The same rows as plain text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def text_table(header: Sequence[str], rows: Rows) -> str:
    """Columns padded with spaces: the first to the left, numbers to the right.

    >>> print(text_table(["model", "params"], [["dense", "12"]]))
    model  params
    dense      12
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """A GitHub table; bars inside cells are escaped and line breaks become spaces."""
    aligned = ["---", *("---:" for _ in header[1:])]
    lines = [[_markdown_cell(cell) for cell in row] for row in [header, aligned, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html_table(header: Sequence[str], rows: Rows, caption: str = "", *, prose: bool = False) -> str:
    """A table whose cells are escaped; with ``prose`` all cells are aligned to the left and wrap."""
    style = "text-align:left;vertical-align:top;white-space:pre-wrap" if prose else "text-align:right"
    left = "text-align:left;vertical-align:top"
    head = "".join(f'<th style="{style if i else left}">{escape(cell)}</th>' for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{style if i else left}">{escape(c)}</td>' for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
