"""Recovery: LoRA, full training and distillation on transformers' Trainer, on data one can have."""

from pruner_lib.recovery.adapters import attach_adapter, linear_modules, merge_adapter
from pruner_lib.recovery.data import format_chat, format_instruction, instruction_prompt
from pruner_lib.recovery.errors import (
    CheckpointWriteError,
    InterruptedRecoveryError,
    NonFiniteLossError,
    RecoveryError,
)
from pruner_lib.recovery.recover import recover
from pruner_lib.recovery.result import RecoveryResult
from pruner_lib.recovery.settings import Distillation, RecoverySettings
from pruner_lib.recovery.sources import load_instructions
from pruner_lib.recovery.teachers import TeacherLogits, precompute_teacher

__all__ = [
    "CheckpointWriteError",
    "Distillation",
    "InterruptedRecoveryError",
    "NonFiniteLossError",
    "RecoveryError",
    "RecoveryResult",
    "RecoverySettings",
    "TeacherLogits",
    "attach_adapter",
    "format_chat",
    "format_instruction",
    "instruction_prompt",
    "linear_modules",
    "load_instructions",
    "merge_adapter",
    "precompute_teacher",
    "recover",
]
