"""What recovery made."""

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
        model: LoRA merged into the weights; an ordinary model of the class it was, ready to save.
        history: one record per optimizer step: ``step`` (from 1), ``loss`` (mean cross-entropy of the
            step's predicted tokens, in nats, before the step), ``learning_rate``.
        settings: what it was trained with.
        num_examples: sequences in the data.
        num_tokens: predicted tokens the loss was taken over, repeats included.
        num_trainable: parameters that LoRA added and trained.
        seconds: time spent training.
        adapter_path: folder of the adapter alone, in PEFT's format; None if it was not kept.
    """

    model: nn.Module
    history: tuple[Mapping[str, Any], ...]
    settings: RecoverySettings
    num_examples: int
    num_tokens: int
    num_trainable: int
    seconds: float
    adapter_path: Path | None = None

    @property
    def losses(self) -> list[float]:
        """Training loss of every step."""
        return [record["loss"] for record in self.history]

    def __str__(self) -> str:
        losses = self.losses
        course = f"loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else "no finite step"
        return (
            f"RecoveryResult: {len(losses)} steps of {self.settings.batch_size} sequences, "
            f"{self.num_tokens:,} predicted tokens, rank {self.settings.rank} "
            f"({self.num_trainable / 1e6:.2f} M trained parameters), {course}"
        )

    __repr__ = __str__
