"""A recovery watched while it runs: losses and held-out perplexity as a figure, and a stop button."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from pruner_lib.display.drawing import image_tag
from pruner_lib.display.style import COLOURS, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]


def plot_recovery(records: Records) -> Figure:
    """Training loss per step (left) and held-out perplexity where it was looked at (right).

    Args:
        records: ``RecoveryResult.history``, or what ``on_step`` was given so far.
    """
    figure, (left, right) = new_figure(9, 3.4, ncols=2)
    steps = [record["step"] for record in records]
    left.plot(
        steps, [record["loss"] for record in records], color=COLOURS[0], marker=MARKERS[0], markersize=3
    )
    tidy(left, title="training", xlabel="optimizer step", ylabel="loss (nats per token)")
    seen = [record for record in records if "held_out_perplexity" in record]
    right.plot(
        [record["step"] for record in seen], [record["held_out_perplexity"] for record in seen],
        color=COLOURS[1], marker=MARKERS[1], markersize=5,
    )  # fmt: skip
    tidy(right, title="held-out text", xlabel="optimizer step", ylabel="perplexity")
    if not seen:
        right.set(xticks=[], yticks=[])
        right.annotate("not looked at yet", (0.5, 0.5), xycoords="axes fraction", ha="center")
    return figure


def describe_recovery(records: Records) -> str:
    """What :func:`plot_recovery` shows, in one line."""
    if not records:
        return "No step is done yet."
    first, last = records[0]["loss"], records[-1]["loss"]
    change = "fell" if last < first else "did not fall"
    line = f"Over {len(records)} steps the training loss {change}"
    seen = [record["held_out_perplexity"] for record in records if "held_out_perplexity" in record]
    if not seen:
        return f"{line}; no held-out text was looked at."
    best = next(record["step"] for record in records if record.get("held_out_perplexity") == min(seen))
    return f"{line}; held-out perplexity was lowest at step {best}."


class RecoveryMonitor(widgets.VBox):
    """See :func:`recovery_monitor`."""

    def __init__(self, every: float, clock: Callable[[], float]) -> None:
        self.records: list[dict[str, Any]] = []
        self.text = widgets.HTML("Waiting for the first step.")
        self.picture = widgets.HTML()
        self.stop = widgets.Button(
            description="Stop after this step",
            icon="stop",
            button_style="warning",
            tooltip="End training; the best state so far is returned",
            layout={"width": "14em"},
        )
        self.stopped = False
        self._every, self._clock, self._drawn = every, clock, -float("inf")
        self.stop.on_click(lambda button: self._press())
        super().__init__([self.stop, self.text, self.picture])
        self.add_class("pruner-lab")
        self.add_class("pruner-lab-recovery")

    def _press(self) -> None:
        self.stop.disabled = True
        self.text.value = "Stopping after this step …"
        self.stopped = True  # last: the training thread may answer at once, and its text must stay

    def __call__(self, record: Mapping[str, Any]) -> bool:
        """Take a step's record in; true once the button has been pressed. This is ``on_step``."""
        if record["step"] == 1 and self.records:  # a new run in the same monitor
            self.records.clear()
        self.records.append(dict(record))
        looked = "held_out_perplexity" in record
        if looked or self.stopped or self._clock() - self._drawn >= self._every:
            self.draw()
        return self.stopped

    async def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call ``recover`` so that the button answers meanwhile: ``await monitor.run(recover, model, …)``.

        The function runs in a thread of its own, with this monitor as ``on_step``, and the notebook
        stays free to take clicks. What it raises is raised here.
        """
        try:
            return await asyncio.to_thread(function, *arguments, on_step=self, **options)
        finally:  # also what happened since the last drawing
            if self.records:
                self.draw()

    def draw(self) -> None:
        """Show all records up to now."""
        last = self.records[-1]
        parts = [f"Step {last['step']}: loss {last['loss']:.3f}"]
        seen = [r["held_out_perplexity"] for r in self.records if "held_out_perplexity" in r]
        parts += [f"held-out perplexity {seen[-1]:.2f}, lowest {min(seen):.2f}"] if seen else []
        parts += ["stopped"] if self.stopped else []
        self.text.value = f"<b>{escape(', '.join(parts))}.</b>"
        self.picture.value = image_tag(plot_recovery(self.records), describe_recovery(self.records))
        self._drawn = self._clock()


def recovery_monitor(*, every: float = 2.0, clock: Callable[[], float] = time.monotonic) -> RecoveryMonitor:
    """A figure that follows a recovery, with a button that ends it and keeps the best state.

    >>> monitor = recovery_monitor()
    >>> display(monitor)
    >>> result = await monitor.run(recover, model, tokenizer, data, held_out=text)

    A notebook takes no clicks while an ordinary cell runs; awaiting leaves it free to. Where nobody will
    press the button, ``recover(…, on_step=monitor)`` draws the same. Controls: ``stop``. All records
    are in ``records``.

    Args:
        every: seconds between two drawings; a look at the held-out text is always drawn.
        clock: tells the seconds.
    """
    return RecoveryMonitor(every, clock)
