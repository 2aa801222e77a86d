"""What training is told, which loss it takes, and what it may not touch."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.losses import IGNORED, token_losses
from pruner_lib.recovery.settings import Distillation, RecoverySettings
from pruner_lib.recovery.teachers import ModelTeacher, TeacherLogits

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from pruner_lib.recovery.recording import Recorder


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python inside, and give back their states, and the environment, after."""
    python, numpy_state, environment = random.getstate(), np.random.get_state(), dict(os.environ)
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the engines say to each other and no caller can act on."""
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # PEFT finds by itself that Conv1D stores its weight transposed, and says so for each layer.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        yield


def is_chosen_gpu(device: torch.device) -> bool:
    """Whether a model's GPU is the caller's choice: in a distributed run each process is given one."""
    return device.type == "cuda" and "LOCAL_RANK" not in os.environ


def training_arguments(
    settings: RecoverySettings, device: torch.device, steps: int, folder: str
) -> TrainingArguments:
    """The trainer's arguments; it reports to nobody and writes nothing by itself.

    Of several GPUs ``device`` becomes the current one, since transformers and accelerate train there; the
    caller puts the former one back. In a distributed run each process has its own instead.

    Raises:
        RecoveryError: the step's sequences cannot be dealt out evenly to the processes.
    """
    from pruner_lib.recovery.engine import Arguments

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = _per_process(settings, processes)
    on_cpu = device.type == "cpu"
    arguments = Arguments(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // (micro * processes),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.num_warmup_steps(steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=bool(settings.bf16),
        use_cpu=on_cpu,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    if is_chosen_gpu(device):
        torch.cuda.set_device(device)  # setting up has made the first GPU the current one
        arguments.where = device
    # Several visible GPUs would otherwise be used through DataParallel, which torch advises against.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _per_process(settings: RecoverySettings, processes: int) -> int:
    """Sequences that each process runs at once: micro_batch, or less where its share is less."""
    if settings.batch_size % processes:
        raise RecoveryError(
            f"batch_size {settings.batch_size} cannot be dealt out to {processes} processes; make it a "
            "multiple of their number"
        )
    share = settings.batch_size // processes
    return next(size for size in range(min(settings.micro_batch, share), 0, -1) if share % size == 0)


def order_of_examples(count: int, total: int, seed: int) -> list[int]:
    """Which example comes when: one shuffled pass over all after another, cut off at ``total``.

    It depends on nothing else, so neither a resumed run nor another number of processes changes
    which examples make a step.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < total:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:total]


class Objective:
    """The loss of a micro-batch: cross-entropy, divergence from the teacher, distance of hidden states."""

    def __init__(
        self, recorder: Recorder, distillation: Distillation, teacher: ModelTeacher | TeacherLogits | None
    ) -> None:
        self._recorder, self._distillation, self._teacher = recorder, distillation, teacher
        self._hidden = teacher is not None and distillation.hidden_weight > 0

    def __call__(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        """Σ over the micro-batch's predicted tokens / predicted tokens of the whole step.

        So micro-batches add up to the mean over the step's tokens, however they are spread.
        """
        labels, rows = inputs.pop("labels"), inputs.pop("rows").tolist()
        lesson = None if self._teacher is None else self._teacher.lesson(inputs, rows)
        outputs = model(**inputs, use_cache=False, output_hidden_states=self._hidden)
        found = token_losses(
            outputs.logits,
            labels,
            soft=None if lesson is None else lesson.soft,
            weight=self._distillation.weight,
            temperature=self._distillation.temperature,
        )
        total, hidden = found.total, 0.0
        if self._hidden and lesson is not None:
            distance = hidden_distance(outputs.hidden_states[1:], lesson.hidden_states, labels)
            total = total + self._distillation.hidden_weight * distance.to(total)
            hidden = float(distance.detach())
        self._recorder.add(found, float(total.detach()), hidden)
        return total / (found.count if count is None else count)


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Σ over predicting tokens of the mean over layers of ‖h_s − h_t‖² / ‖h_t‖².

    Args:
        student: one ``[B, L, D]`` per layer.
        teacher: one per layer of the teacher; where it has more, layer i of n is held against its
            layer ⌈i · m / n⌉ of m.
        labels: ``[B, L]``; the token before a predicted one counts.
    """
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != IGNORED
    total = torch.zeros((), device=student[0].device)
    for number, mine in enumerate(student, start=1):
        theirs = teacher[-(-number * len(teacher) // len(student)) - 1].to(mine.device)[counts].float()
        gap = (mine[counts].float() - theirs).square().sum(-1)
        total = total + (gap / theirs.square().sum(-1).clamp_min(1e-12)).sum()
    return total / len(student)
