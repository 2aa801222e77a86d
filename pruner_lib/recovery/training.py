"""transformers' Trainer as the engine: what it is told, what is recorded, and what it may not touch."""

from __future__ import annotations

import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from pruner_lib.recovery.data import IGNORED
from pruner_lib.recovery.settings import RecoverySettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

OnStep = Callable[[Mapping[str, Any]], object]
_WINDOW = 5  # steps over which the loss is averaged when the best state is looked for


class LossIsNotFinite(Exception):
    """Raised inside the trainer to stop it; never leaves this package."""


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


def training_arguments(settings: RecoverySettings, device: torch.device, folder: str) -> TrainingArguments:
    """The trainer's arguments; it reports to nobody and writes nothing."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        num_train_epochs=1.0 if settings.epochs is None else settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    # Several visible GPUs would otherwise be used through DataParallel, which torch advises against.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class Recorder(TrainerCallback):
    """Takes the loss, keeps its history and the best state so far.

    Attributes:
        history: records of the finished steps.
        num_tokens: predicted tokens so far.
        best: adapter weights with the lowest loss, averaged over the last steps; empty before the first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], on_step: OnStep | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        self.num_tokens = 0
        self.best: dict[str, Tensor] = {}
        self._parameters = parameters
        self._on_step = on_step
        self._lowest = math.inf
        self._loss = 0.0
        self._rate = 0.0

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Σ cross-entropy of the micro-batch's predicted tokens / predicted tokens of the whole step.

        So micro-batches add up to the mean over the step's tokens, however they are spread.
        """
        logits = outputs["logits"][:, :-1].float().flatten(0, 1)
        targets = labels[:, 1:].to(logits.device).flatten()
        count = (targets != IGNORED).sum()
        total = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LossIsNotFinite
        self._loss += value
        self.num_tokens += int(count)
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights that gave this step's loss are still in place: keep them if it is the lowest."""
        self._rate = kwargs["optimizer"].param_groups[0]["lr"]
        recent = [record["loss"] for record in self.history[1 - _WINDOW :]] + [self._loss]
        mean = sum(recent) / len(recent)
        if mean < self._lowest:
            self._lowest = mean
            self.best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Write the step down; stop if the caller's function says so."""
        record = {"step": state.global_step, "loss": self._loss, "learning_rate": self._rate}
        self.history.append(record)
        self._loss = 0.0
        if self._on_step is not None and self._on_step(dict(record)):
            control.should_training_stop = True
        return control

    def restore_best(self) -> None:
        """Put the best state back; without one, undo the adapter (B = 0 leaves the model as it was)."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self.best:
                    parameter.copy_(self.best[name])
                elif "lora_B" in name:
                    parameter.zero_()
                else:
                    parameter.nan_to_num_(0.0, 0.0, 0.0)


class Progress(TrainerCallback):
    """A bar on standard error with the current loss."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=state.max_steps, desc="recover", unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{self._recorder.history[-1]['loss']:.3f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        """End the bar, also after an exception."""
        if self._bar is not None:
            self._bar.close()
