"""What recovery returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pruner_lib.recovery.settings import RecoverySettings


@dataclass(frozen=True, eq=False)
class RecoveryResult:
    """A recovered model and how it came about.

    Attributes:
        model: what was learnt merged into the weights; an ordinary model of the class it was, ready to save.
        history: one record per optimizer step: ``step`` (from 1), ``loss`` (mean over the step's predicted
            tokens, in nats, before the step), ``learning_rate``; with a teacher also ``cross_entropy``,
            ``divergence`` and ``hidden_distance``; ``held_out_perplexity`` where it was looked at.
        settings: what it was trained with.
        num_examples: rows in the data.
        num_tokens: predicted tokens the loss was taken over, repeats included.
        num_trainable: parameters that were trained.
        seconds: time spent training; of a resumed run, since it was resumed.
        adapter_path: folder of the adapter alone, in PEFT's format; None if it was not kept.
        held_out: ``(step, perplexity)`` on the held-out text, step 0 before training; empty without one.
    """

    model: nn.Module
    history: tuple[Mapping[str, Any], ...]
    settings: RecoverySettings
    num_examples: int
    num_tokens: int
    num_trainable: int
    seconds: float
    adapter_path: Path | None = None
    held_out: tuple[tuple[int, float], ...] = ()

    @property
    def losses(self) -> list[float]:
        """Training loss of every step."""
        return [record["loss"] for record in self.history]

    @property
    def best_step(self) -> int | None:
        """Step whose state was lowest in held-out perplexity, and is in ``model``; None without such text."""
        return min(self.held_out, key=lambda pair: pair[1])[0] if self.held_out else None

    def __str__(self) -> str:
        losses = self.losses
        course = f"loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else "no finite step"
        how = f"rank {self.settings.rank}" if self.settings.method == "lora" else "full weights"
        held = ""
        if self.held_out:
            best = min(value for _, value in self.held_out)
            held = f", held-out perplexity {self.held_out[0][1]:.2f} → {best:.2f} (step {self.best_step})"
        return (
            f"RecoveryResult: {len(losses)} steps of {self.settings.batch_size} sequences, "
            f"{self.num_tokens:,} predicted tokens, {how} "
            f"({self.num_trainable / 1e6:.2f} M trained parameters), {course}{held}"
        )

    __repr__ = __str__
