"""The bench on which models answer a typed prompt, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from torch import nn

from pruner_lib.display.widgets.panel import WIDE, Panel, table, whole
from pruner_lib.evaluation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GenerationBench(Panel):
    """See :func:`generation_bench`."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        writer: Callable[..., Any],
    ) -> None:
        self._models, self._tokenizer, self._writer = dict(models), tokenizer, writer
        self.answers: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None
        self._stopped = False
        wide = {"width": "90%"}
        super().__init__(
            {
                "prompt": widgets.Text(
                    value=prompt, description="Prompt", continuous_update=False, style=WIDE, layout=wide
                ),
                "max_new_tokens": whole("New tokens", 30, 100, low=5),
                "button": widgets.Button(description="Generate", icon="play", button_style="primary"),
                "stop": widgets.Button(description="Stop", icon="stop", disabled=True),
            },
            name="bench",
        )
        self.children = (self.prompt, self.max_new_tokens, self._row(), self.text, self.picture)
        self.say("Press Generate, or type another prompt and Enter.")
        self.button.on_click(lambda button: self.start())
        self.stop.on_click(lambda button: self._stop())
        self.prompt.observe(lambda change: self.start(), names="value")

    def _row(self) -> widgets.HBox:
        return widgets.HBox([self.button, self.stop], layout={"margin": "0 0 0 9.4em"})

    def _stop(self) -> None:
        self._stopped = True
        self.stop.disabled = True

    def start(self) -> None:
        """Write now; in a notebook in a thread, so that Stop and all other widgets answer meanwhile."""
        if self.button.disabled:  # still writing: the new prompt waits for a press of the button
            return
        self._stopped, self.answers = False, dict.fromkeys(self._models, "")
        self.button.disabled, self.stop.disabled = True, False
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook: a test, a script
            self._write()
        else:
            self.task = loop.create_task(asyncio.to_thread(self._write))

    def _write(self) -> None:
        try:
            self.update()
        except Exception as error:  # nothing else would show it: the thread belongs to no cell
            self.say(f"<b>{type(error).__name__}:</b> {escape(str(error))}")
        finally:
            self.button.disabled, self.stop.disabled = False, True

    def _told(self, model: str, prompt: str, text: str) -> bool:
        self.answers[model] = text
        self.picture.value = self._columns(model)
        return self._stopped

    def show(self) -> None:
        self.say(f"Writing after <b>{escape(self.prompt.value)}</b> …")
        self.picture.value = self._columns("")
        found = self._writer(
            self._models,
            self._tokenizer,
            self.prompt.value,
            max_new_tokens=self.max_new_tokens.value,
            on_text=self._told,
        )
        self.answers = {name: found.text(name, self.prompt.value) for name in found.models}
        self.picture.value = self._columns("", found.statistics())
        self.say(f"{'Stopped' if self._stopped else 'Done'}: {escape(found.conditions)}.")

    def _columns(self, writing: str, statistics: Mapping[str, Mapping[str, float]] | None = None) -> str:
        """One column per model; a mark follows the text that is growing."""
        prompt = f'<span style="opacity:0.65">{escape(self.prompt.value)}</span>'
        style = "white-space:pre-wrap;overflow-wrap:anywhere;min-width:12em;max-width:26em"
        texts = [
            f'<div class="pruner-lab-answer" style="{style}">{prompt}'
            f"<b>{escape(text)}</b>{' ▌' if name == writing else ''}</div>"
            for name, text in self.answers.items()
        ]
        rows = [texts]
        if statistics:
            rows.append(
                [
                    f"{numbers['num_tokens']:.0f} tokens, repetition {numbers['repetition']:.2f}"
                    for numbers in statistics.values()
                ]
            )
        return f'<div style="font-size:1.15em">{table([escape(name) for name in self.answers], rows)}</div>'


def generation_bench(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "The capital of France is",
    writer: Callable[..., Any] = generate,
) -> GenerationBench:
    """Type a prompt: what each model writes after it, side by side, token by token.

    Nothing is written until ``button`` is pressed or the prompt changes. In a notebook the models write in
    a thread, one after the other, and ``stop`` ends them after the next token. Controls: ``prompt``,
    ``max_new_tokens``, ``button``, ``stop``. The texts are in ``answers``.

    Args:
        models: name to model, for example dense, pruned and recovered.
        tokenizer: theirs.
        prompt: to begin with.
        writer: called as ``generate`` is, ``on_text`` included, and returns what it returns.
    """
    return GenerationBench(models, tokenizer, prompt, writer)
