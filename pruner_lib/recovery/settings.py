"""How recovery trains: the paper's setting by name, and one for a laptop as the default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from pruner_lib.recovery.errors import RecoveryError


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of LoRA recovery; the defaults take a minute or two for 135M parameters on two cores.

    LoRA replaces W x by W x + (alpha / rank) · B A x, with A ``[rank, in]`` and B ``[out, rank]`` trained
    and W frozen. B starts at zero, so nothing changes before the first step.

    Raises:
        RecoveryError: a value out of range, or both or neither of ``max_steps`` and ``epochs``.
    """

    rank: int = 8  # r of LoRA
    alpha: int = 16  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of A, while training
    learning_rate: float = 1e-3  # peak of AdamW; rises over the warm-up, then falls linearly to 0
    batch_size: int = 8  # sequences per optimizer step
    micro_batch: int = 8  # sequences run at once; batch_size is a multiple of it
    seq_len: int = 128  # window of packed text; longer instruction examples are cut here
    max_steps: int | None = 40  # optimizer steps; None where epochs says how long
    epochs: float | None = None  # passes over the data
    warmup_steps: int = 4  # steps over which the learning rate rises
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 leaves them
    seed: int = 0  # of A's values, the order of the data and dropout
    bf16: bool = True  # autocast products to bfloat16; weights and losses stay as they are
    target: str | tuple[str, ...] = "all-linear"  # or endings of module names, such as ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "micro_batch"):
            self._require(
                name, _is_whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number from 1"
            )
        self._require("seq_len", _is_whole(self.seq_len) and self.seq_len >= 2, "a whole number from 2")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "a finite number above 0")
        for name in ("warmup_steps", "max_grad_norm", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        if self.batch_size % self.micro_batch:
            raise RecoveryError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}; a step "
                "adds "
                "up whole micro-batches"
            )
        if (self.max_steps is None) == (self.epochs is None):
            raise RecoveryError(
                f"give either max_steps or epochs and set the other to None; got max_steps={self.max_steps}, "
                f"epochs={self.epochs}"
            )
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "1 or more")
        self._require("epochs", self.epochs is None or self.epochs > 0, "above 0")
        named = isinstance(self.target, tuple) and bool(self.target)
        self._require(
            "target", self.target == "all-linear" or named, "'all-linear' or a tuple of module names"
        )

    def _require(self, name: str, fine: bool, valid: str) -> None:
        if not fine:
            raise RecoveryError(f"{name} must be {valid}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, **changes: Any) -> RecoverySettings:
        """LLM-Pruner's setting: r 8, α 16, dropout 0.05, lr 1e-4, batch 64 in fours, 2 epochs, cut-off 256.

        Args:
            **changes: fields to set otherwise; ``max_steps=…`` also unsets ``epochs``.
        """
        values: dict[str, Any] = {
            "rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 1e-4, "batch_size": 64,
            "micro_batch": 4, "seq_len": 256, "max_steps": None, "epochs": 2.0, "warmup_steps": 100,
        }  # fmt: skip
        if changes.get("max_steps") is not None:
            values["epochs"] = None
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise RecoveryError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**{**values, **changes})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
