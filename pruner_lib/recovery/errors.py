"""What can go wrong in recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner_lib.recovery.result import RecoveryResult


class RecoveryError(ValueError):
    """The model, the data or the settings cannot be used; the message says what to do."""


class InterruptedRecoveryError(RecoveryError):
    """Training could not go on; what it had reached is in :attr:`result`.

    Attributes:
        step: the optimizer step (from 1) at which it stopped.
        result: the state that was kept, merged like an ordinary result. Nothing is lost.
    """

    def __init__(self, message: str, step: int, result: RecoveryResult) -> None:
        super().__init__(message)
        self.step = step
        self.result = result


class NonFiniteLossError(InterruptedRecoveryError):
    """Training stopped because the loss became NaN or infinite.

    ``result`` is the best state reached before; its ``history`` ends at the last finite step.
    """


class CheckpointWriteError(InterruptedRecoveryError):
    """Training stopped because a checkpoint, or at its end the adapter, could not be written: a full disk.

    ``result`` is the state at that step; what was written before is still whole.
    """
