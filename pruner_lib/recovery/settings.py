"""How recovery trains: the paper's setting by name, and one for a laptop as the default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pruner_lib.assets.devices import computes_in_bfloat16
from pruner_lib.recovery.errors import RecoveryError

METHODS = ("lora", "full")
SCHEDULES = ("linear", "cosine", "constant")
TEMPLATES = ("alpaca", "chat")


def _require(settings: Any, name: str, fine: bool, valid: str) -> None:
    if not fine:
        raise RecoveryError(f"{name} must be {valid}, got {getattr(settings, name)!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True)
class Distillation:
    """What is learnt from a teacher. Read only when ``recover`` is given one.

    With s and t the student's and the teacher's logits at one predicted token, y that token and T the
    temperature, the loss of the token is

        (1 − weight) · CE(y, softmax s) + weight · T² · KL(softmax(t / T) ‖ softmax(s / T))
        + hidden_weight · mean over layers of ‖h_s − h_t‖² / ‖h_t‖²

    T² keeps the gradient's size the same at every temperature. h is the residual stream after a
    layer; a student of fewer layers is compared with evenly spaced ones of the teacher.

    Raises:
        RecoveryError: a value out of range.

    Source: Hinton et al. 2015, arXiv 1503.02531; hidden states as in TinyBERT, arXiv 1909.10351.
    """

    temperature: float = 1.0  # above 1 the teacher's less likely tokens weigh more
    weight: float = 1.0  # 0 learns from the text alone, 1 from the teacher's distribution alone
    hidden_weight: float = 0.0  # 0 leaves the hidden states alone

    def __post_init__(self) -> None:
        _require(self, "temperature", _is_positive(self.temperature), "a finite number above 0")
        _require(self, "weight", 0 <= self.weight <= 1, "in [0, 1]")
        fine = math.isfinite(self.hidden_weight) and self.hidden_weight >= 0
        _require(self, "hidden_weight", fine, "a finite number, 0 or more")


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of recovery; the defaults take a few minutes for 135M parameters on two cores.

    LoRA replaces W x by W x + (alpha / rank) · B A x, with A ``[rank, in]`` and B ``[out, rank]`` trained
    and W frozen. B starts at zero, so nothing changes before the first step. ``method="full"`` trains
    the weights themselves.

    Raises:
        RecoveryError: a value out of range, or both or neither of ``max_steps`` and ``epochs``.
    """

    rank: int = 8  # r of LoRA
    alpha: int = 16  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of A, while training
    learning_rate: float = 1e-3  # peak of AdamW; rises over the warm-up, then follows the schedule
    batch_size: int = 8  # sequences per optimizer step, over all processes together
    micro_batch: int = 8  # sequences run at once; batch_size is a multiple of it
    seq_len: int = 128  # window of packed text; longer instruction examples are cut here
    max_steps: int | None = 40  # optimizer steps; None where epochs says how long
    epochs: float | None = None  # passes over the data; the last step is filled up from the next pass
    warmup_steps: int = 4  # steps over which the learning rate rises from 0; fewer in a run that is no longer
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 leaves them
    seed: int = 0  # of A's values, the order of the data and dropout
    bf16: bool | None = None  # autocast products to bfloat16; None where the device has it in hardware
    target: str | tuple[str, ...] = "all-linear"  # or endings of module names, such as ("q_proj", "v_proj")
    method: str = "lora"  # "full": the target's weights; with target "all" every parameter
    schedule: str = "linear"  # or "cosine", both down to 0, or "constant"
    weight_decay: float = 0.0  # of AdamW
    packing: bool = True  # short examples share a row of seq_len without seeing each other
    template: str = "alpaca"  # how instructions are written: "alpaca", or the tokenizer's "chat" template
    gradient_checkpointing: bool = False  # less memory for activations, about a third more time
    evaluate_every: int = 10  # steps between looks at the held-out text, if one is given
    patience: int = 0  # looks without a better one after which training stops; 0 never stops
    checkpoint_every: int = 0  # steps between checkpoints in output_dir; 0 writes none
    distillation: Distillation = Distillation()  # read only with a teacher

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "micro_batch", "evaluate_every"):
            value = getattr(self, name)
            _require(self, name, _is_whole(value) and value >= 1, "a whole number from 1")
        for name in ("patience", "checkpoint_every", "seed", "warmup_steps"):
            value = getattr(self, name)
            _require(self, name, _is_whole(value) and value >= 0, "a whole number, 0 or more")
        _require(self, "seq_len", _is_whole(self.seq_len) and self.seq_len >= 2, "a whole number from 2")
        _require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for name in ("alpha", "learning_rate"):
            _require(self, name, _is_positive(getattr(self, name)), "a finite number above 0")
        for name in ("packing", "gradient_checkpointing"):
            _require(self, name, isinstance(getattr(self, name), bool), "True or False")
        _require(self, "bf16", self.bf16 is None or isinstance(self.bf16, bool), "True, False or None")
        for name in ("max_grad_norm", "weight_decay"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name, valid in (("method", METHODS), ("schedule", SCHEDULES), ("template", TEMPLATES)):
            _require(self, name, getattr(self, name) in valid, f"one of {', '.join(valid)}")
        self._check_length()
        self._check_target()

    def _check_length(self) -> None:
        if self.batch_size % self.micro_batch:
            raise RecoveryError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}; a step "
                "adds up whole micro-batches"
            )
        if (self.max_steps is None) == (self.epochs is None):
            raise RecoveryError(
                f"give either max_steps or epochs and set the other to None; got max_steps={self.max_steps}, "
                f"epochs={self.epochs}"
            )
        whole = self.max_steps is None or (_is_whole(self.max_steps) and self.max_steps >= 1)
        _require(self, "max_steps", whole, "1 or more")
        _require(self, "epochs", self.epochs is None or _is_positive(self.epochs), "above 0")

    def _check_target(self) -> None:
        named = isinstance(self.target, tuple) and bool(self.target)
        general = ("all-linear",) if self.method == "lora" else ("all-linear", "all")
        _require(
            self,
            "target",
            named or self.target in general,
            f"{' or '.join(map(repr, general))} or a tuple of module names",
        )

    def on(self, device: torch.device) -> RecoverySettings:
        """These settings with ``bf16`` decided for a device."""
        return replace(self, bf16=computes_in_bfloat16(device)) if self.bf16 is None else self

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps over so many examples.

        >>> RecoverySettings(max_steps=None, epochs=2, batch_size=8).num_steps(10)  # 20 / 8
        3
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_examples / self.batch_size - 1e-9))

    def num_warmup_steps(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps; at least the last step trains at the peak.

        Step k of w trains at (k − 1) / w of the peak, so a run that ended before its warm-up would never
        reach it, and a run of one step would train at rate 0.

        >>> RecoverySettings(warmup_steps=4).num_warmup_steps(3)
        2
        """
        return min(self.warmup_steps, steps - 1)

    @classmethod
    def paper(cls, **changes: Any) -> RecoverySettings:
        """LLM-Pruner's setting: r 8, α 16, dropout 0.05, lr 1e-4, batch 64 in fours, 2 epochs, cut-off 256.

        One instruction is one sequence, without packing, so that a batch means what it means there.

        Args:
            **changes: fields to set otherwise; ``max_steps=…`` also unsets ``epochs``.
        """
        values: dict[str, Any] = {
            "rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 1e-4, "batch_size": 64,
            "micro_batch": 4, "seq_len": 256, "max_steps": None, "epochs": 2.0, "warmup_steps": 100,
            "packing": False,
        }  # fmt: skip
        if changes.get("max_steps") is not None:
            values["epochs"] = None
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise RecoveryError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**{**values, **changes})
