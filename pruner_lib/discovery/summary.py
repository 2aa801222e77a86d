"""A map on one screen: families that repeat from layer to layer take one row."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .families import GroupFamily

if TYPE_CHECKING:
    from .dependency_map import DependencyMap

MOST_ROWS = 40
WIDTH = 100  # of the printed table
_HEAD = ("kind", "families", "groups", "layers")


@dataclass(frozen=True)
class Row:
    """All families of one kind and size that may be cut, or are blocked for the same reason."""

    kind: str
    families: int
    size: int
    layers: str
    blocked: str | None
    partition: bool

    @property
    def note(self) -> str:
        if self.blocked:
            return f"blocked: {self.blocked}"
        return "as many in each part" if self.partition else ""


def rows_of(families: Iterable[GroupFamily]) -> list[Row]:
    """Rows in the order of the families; the free ones first."""
    merged: dict[tuple[str, int, str | None, bool], list[int | None]] = {}
    for family in families:
        reason = None if family.blocked is None else any_layer(family.blocked)
        key = (family.kind, family.size, reason, family.partition is not None)
        merged.setdefault(key, []).append(family.layer)
    rows = [
        Row(kind, len(layers), size, ranges(layers), reason, partition and reason is None)
        for (kind, size, reason, partition), layers in merged.items()
    ]
    return sorted(rows, key=lambda row: row.blocked is not None)


def any_layer(reason: str) -> str:
    """A reason with the numbers in module paths replaced by ``*``: ``model.layers.*.self_attn``."""
    return re.sub(r"\.\d+(?=[.\s,)]|$)", ".*", reason)


def ranges(layers: Iterable[int | None]) -> str:
    """``[0, 1, 2, 5]`` as ``"0–2, 5"``; families that span layers as ``"all"``."""
    numbers = sorted({layer for layer in layers if layer is not None})
    if not numbers:
        return "all"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def title(dependencies: DependencyMap) -> str:
    groups = sum(family.size for family in dependencies.families)
    return f"{dependencies.num_layers} layers, {len(dependencies.families):,} families, {groups:,} groups"


def without_rule(dependencies: DependencyMap) -> list[str]:
    """One line per operator without a rule."""
    return [
        f"no rule for {operator} (called in {', '.join(sorted(modules)[:3])}): what it touches is blocked"
        for operator, modules in dependencies.without_rule.items()
    ]


def as_text(dependencies: DependencyMap) -> str:
    """A table for a terminal."""
    rows = rows_of(dependencies.families)
    lines = [f"DependencyMap: {title(dependencies)}"]
    lines.append(f"  {_HEAD[0]:<15}{_HEAD[1]:>9}{_HEAD[2]:>9}  {_HEAD[3]}")
    for row in rows[:MOST_ROWS]:
        cells = f"  {row.kind:<15}{row.families:>9,}{row.size:>9,}  "
        rest = f"{row.layers:<8} {row.note}".rstrip()
        lines += textwrap.wrap(rest, WIDTH, initial_indent=cells, subsequent_indent=" " * (len(cells) + 9))
    if len(rows) > MOST_ROWS:
        lines.append(f"  … and {len(rows) - MOST_ROWS} more rows")
    for line in without_rule(dependencies):
        lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def as_html(dependencies: DependencyMap) -> str:
    """A table for Jupyter; blocked rows are grey."""
    rows = rows_of(dependencies.families)
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in (*_HEAD, ""))
    body = "".join(_html_row(row) for row in rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        body += f"<tr><td colspan='5'>… and {len(rows) - MOST_ROWS} more rows</td></tr>"
    notes = "".join(f"<p>{escape(line)}</p>" for line in without_rule(dependencies))
    caption = f"<caption>DependencyMap: {escape(title(dependencies))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _html_row(row: Row) -> str:
    style = " style='color:#666666'" if row.blocked else ""
    cells = (row.kind, f"{row.families:,}", f"{row.size:,}", row.layers, row.note)
    return f"<tr{style}>{''.join(f'<td style=text-align:left>{escape(cell)}</td>' for cell in cells)}</tr>"
