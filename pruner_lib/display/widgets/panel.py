"""What all widgets share: a box of labelled controls above what they show."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import traitlets

READABLE = "line-height:1.45;font-size:1.1em"
WIDE = {"description_width": "9em"}


class Panel(widgets.VBox):
    """Controls above, text and picture below; :meth:`show` runs at every change of a control."""

    def __init__(self, controls: Mapping[str, Any], *, name: str) -> None:
        self.text = widgets.HTML()
        self.picture = widgets.HTML()
        for attribute, control in controls.items():
            setattr(self, attribute, control)
        super().__init__([*controls.values(), self.text, self.picture])
        self.add_class("pruner-lab")
        self.add_class(f"pruner-lab-{name}")  # how a page's script or a test finds it

    def follow(self, *controls: Any) -> None:
        """Show now, and again whenever one of the controls changes."""
        for control in controls:
            control.observe(lambda change: self.update(), names="value")
        self.update()

    def update(self) -> None:
        """Show, or say in words why not."""
        try:
            self.show()
        except (ValueError, IndexError, KeyError) as error:
            said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            self.say(f"<b>Not possible:</b> {escape(said)}")
            self.picture.value = ""

    def say(self, html: str) -> None:
        """Put something into ``text``, where a screen reader notices."""
        self.text.value = f'<div role="status" aria-live="polite" style="{READABLE}">{html}</div>'

    @abstractmethod
    def show(self) -> None:
        """What the controls say now, into ``text`` and ``picture``."""


class Choices(widgets.HBox):
    """One labelled checkbox per option; ``value`` holds the ticked ones in the order of the options."""

    value: Any = traitlets.Tuple()
    _setting = False

    def __init__(self, label: str, options: Sequence[str], value: Iterable[str]) -> None:
        self.boxes = {
            option: widgets.Checkbox(description=option, indent=False, layout={"width": "auto"})
            for option in options
        }
        title = widgets.Label(
            label, layout={"width": "9em", "justify_content": "flex-end", "margin": "2px 8px 2px 0"}
        )
        row = widgets.HBox(list(self.boxes.values()), layout={"flex_flow": "row wrap", "grid_gap": "0 1em"})
        super().__init__([title, row])
        for box in self.boxes.values():
            box.observe(lambda change: self._ticked(), names="value")
        self.observe(lambda change: self._set(change["new"]), names="value")
        self.value = tuple(value)

    def _ticked(self) -> None:
        if not self._setting:
            self.value = tuple(option for option, box in self.boxes.items() if box.value)

    @traitlets.validate("value")
    def _known(self, proposal: Mapping[str, Any]) -> tuple[str, ...]:
        unknown = [option for option in proposal["value"] if option not in self.boxes]
        if unknown:
            raise traitlets.TraitError(f"{unknown[0]!r} is none of {', '.join(self.boxes)}")
        return tuple(option for option in self.boxes if option in proposal["value"])

    def _set(self, value: Sequence[str]) -> None:
        self._setting = True  # several boxes, one change
        for option, box in self.boxes.items():
            box.value = option in value
        self._setting = False


def share(label: str, value: float, low: float, high: float, step: float = 0.05) -> widgets.FloatSlider:
    """A slider for a share; it tells every position it passes."""
    return widgets.FloatSlider(
        value=value, min=low, max=high, step=step, description=label, style=WIDE, layout={"width": "46em"}
    )


def whole(label: str, value: int, high: int, low: int = 0) -> widgets.IntSlider:
    """A slider for a whole number; it tells every position it passes."""
    return widgets.IntSlider(
        value=value, min=low, max=high, description=label, style=WIDE, layout={"width": "46em"}
    )


def between(label: str, value: tuple[int, int], high: int) -> widgets.IntRangeSlider:
    """A slider with two handles, from 0 to ``high``."""
    return widgets.IntRangeSlider(
        value=value, min=0, max=high, description=label, style=WIDE, layout={"width": "46em"}
    )


def choice(label: str, options: Any, value: Any) -> widgets.Dropdown:
    """A drop-down list."""
    return widgets.Dropdown(options=options, value=value, description=label, style=WIDE)


def buttons(label: str, options: Any, value: Any, width: str = "auto") -> widgets.ToggleButtons:
    """A row of buttons of which one is pressed."""
    style = {**WIDE, "button_width": width}
    beside = {"display": "flex", "flex_flow": "row", "align_items": "baseline"}
    made = widgets.ToggleButtons(options=options, value=value, description=label, style=style, layout=beside)
    made.add_class("widget-inline-hbox")  # the label stands as those of all other controls do
    return made


def tick(label: str) -> widgets.Checkbox:
    """One checkbox, below the controls rather than below their labels."""
    return widgets.Checkbox(value=False, description=label, style=WIDE, layout={"width": "46em"})


def items(lines: Sequence[str], most: int = 12) -> str:
    """Lines as the entries of a list, escaped; those beyond ``most`` are counted."""
    extra = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"<li>{escape(line)}</li>" for line in [*lines[:most], *extra])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """An HTML table whose cells are HTML already; the last ``numbers`` columns are aligned to the right."""
    first = len(header) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} style="text-align:{"left" if place < first else "right"};vertical-align:top;'
            f'padding:2px 12px 2px 0">{cell}</{tag}>'
            for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if any(header) else ""
    return f'<table style="border-collapse:collapse;margin:4px 0">{head}<tbody>{body}</tbody></table>'
