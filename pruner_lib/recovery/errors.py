"""What can go wrong in recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner_lib.recovery.result import RecoveryResult


class RecoveryError(ValueError):
    """The model, the data or the settings cannot be used; the message says what to do."""


class NonFiniteLossError(RecoveryError):
    """Training stopped because the loss became NaN or infinite.

    Attributes:
        step: the optimizer step (from 1) whose loss was not finite.
        result: the best state reached before, merged like an ordinary result; its ``history`` ends
            at the last finite step. Nothing is lost.
    """

    def __init__(self, message: str, step: int, result: RecoveryResult) -> None:
        super().__init__(message)
        self.step = step
        self.result = result
