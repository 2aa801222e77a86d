"""Recovery: LoRA on transformers' Trainer, on text, token ids or instructions."""

from pruner_lib.recovery.adapters import linear_modules
from pruner_lib.recovery.data import format_instruction, instruction_prompt
from pruner_lib.recovery.errors import NonFiniteLossError, RecoveryError
from pruner_lib.recovery.recover import recover
from pruner_lib.recovery.result import RecoveryResult
from pruner_lib.recovery.settings import RecoverySettings

__all__ = [
    "NonFiniteLossError",
    "RecoveryError",
    "RecoveryResult",
    "RecoverySettings",
    "format_instruction",
    "instruction_prompt",
    "linear_modules",
    "recover",
]
