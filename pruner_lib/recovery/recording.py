"""What is watched while a model trains: losses, held-out perplexity, the best state, when to stop."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pruner_lib.importance.calibration import untouched
from pruner_lib.recovery.data import Example, collate
from pruner_lib.recovery.losses import TokenLosses, token_losses

OnStep = Callable[[Mapping[str, Any]], object]
_WINDOW = 5  # steps over which the loss is averaged when the best state is looked for
_HEAVY = 0.1  # share of trained parameters from which on the best state is copied less often
_HEAVY_EVERY = 10


class LossIsNotFinite(Exception):
    """Raised inside the trainer to stop it; never leaves this package."""


@dataclass(frozen=True)
class HeldOut:
    """Text that is never learnt from.

    Attributes:
        examples: its windows.
        every: steps between two looks at it.
        patience: looks without a better one after which training stops; 0 never stops.
        micro_batch: windows run at once.
        bf16: autocast, as in training.
        pad_token: fills short rows.
    """

    examples: Sequence[Example]
    every: int
    patience: int
    micro_batch: int
    bf16: bool
    pad_token: int

    def perplexity(self, model: nn.Module, rank: int = 0, processes: int = 1) -> float:
        """exp of the mean −log p over the held-out tokens; every process takes its share of them."""
        device = next(model.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64)
        mine = range(rank * self.micro_batch, len(self.examples), processes * self.micro_batch)
        with untouched(model), torch.no_grad():
            for start in mine:
                batch = collate(self.examples[start : start + self.micro_batch], self.pad_token)
                labels = batch.pop("labels")
                inputs = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    logits = model(**inputs, use_cache=False).logits
                found = token_losses(logits, labels)
                sums += torch.tensor([found.cross_entropy, found.count], dtype=torch.float64)
        total, count = add_up(sums).tolist()
        mean = total / count
        return math.exp(mean) if mean < 709.0 else math.inf


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes; with one process the values themselves."""
    if not _distributed():
        return values
    on_gpu = torch.distributed.get_backend() == "nccl"
    summed = values.to("cuda") if on_gpu else values.clone()
    torch.distributed.all_reduce(summed)
    return summed.cpu()


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and (torch.distributed.get_world_size() > 1)
    )


class Recorder(TrainerCallback):
    """Keeps the history, looks at the held-out text, and holds the best state so far.

    The best state is that of the lowest held-out perplexity; without held-out text that of the lowest
    loss, averaged over the last steps.

    Attributes:
        history: records of the finished steps.
        held_out_history: ``(step, perplexity)``, step 0 being the model before training.
        num_tokens: predicted tokens so far.
        best: trained weights of the best state; empty before there is one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        held_out: HeldOut | None = None,
        on_step: OnStep | None = None,
        teacher: bool = False,
        share: float = 0.0,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.held_out_history: list[tuple[int, float]] = []
        self.num_tokens = 0
        self.best: dict[str, Tensor] = {}
        self.lowest = math.inf
        self._parameters, self._held_out = parameters, held_out
        self._on_step, self._teacher = on_step, teacher
        self._every = _HEAVY_EVERY if share > _HEAVY else 1
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._now: list[float] = []
        self._rate = 0.0

    def add(self, losses: TokenLosses, total: float, hidden: float = 0.0) -> None:
        """Take in one micro-batch's sums."""
        parts = [total, losses.cross_entropy, losses.divergence, hidden, losses.count]
        self._sums += torch.tensor(parts, dtype=torch.float64)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the held-out text before the first step."""
        if self._held_out is not None and not self.held_out_history:
            self._look(args, 0, kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the step's loss. The weights that gave it are still there: keep them if it is the lowest."""
        *sums, count = add_up(self._sums).tolist()
        self._sums.zero_()
        self._now = [value / count for value in sums]
        if not math.isfinite(self._now[0]):
            raise LossIsNotFinite
        self.num_tokens += int(count)
        self._rate = kwargs["optimizer"].param_groups[0]["lr"]
        if self._held_out is not None or state.global_step % self._every:
            return
        recent = [record["loss"] for record in self.history[1 - _WINDOW :]] + [self._now[0]]
        self._keep(sum(recent) / len(recent))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Write the step down; stop if patience is spent or the caller's function says so."""
        step = state.global_step
        record = {"step": step, "loss": self._now[0], "learning_rate": self._rate}
        if self._teacher:
            names = ("cross_entropy", "divergence", "hidden_distance")
            record.update(zip(names, self._now[1:], strict=True))
        stop = False
        if self._held_out is not None and (step % self._held_out.every == 0 or step >= state.max_steps):
            record["held_out_perplexity"] = self._look(args, step, kwargs["model"])
            stop = self.is_out_of_patience()
        self.history.append(record)
        if self._on_step is not None and state.is_world_process_zero:
            stop = bool(self._on_step(dict(record))) or stop
        if add_up(torch.tensor([float(stop)])).item() > 0:
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look once more where training ended between two looks, so that its last state can be the best."""
        if self._held_out is not None and self.held_out_history[-1][0] != state.global_step:
            self._look(args, state.global_step, kwargs["model"])

    def _look(self, args: Any, step: int, model: nn.Module) -> float:
        assert self._held_out is not None
        bare = getattr(model, "module", model)
        value = self._held_out.perplexity(bare, args.process_index, args.world_size)
        self.held_out_history.append((step, value))
        self._keep(value)
        return value

    def _keep(self, value: float) -> None:
        if value < self.lowest:
            self.lowest = value
            self.best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def is_out_of_patience(self) -> bool:
        """Whether the held-out text has ended the run; also true of one that is resumed where it ended."""
        if self._held_out is None or not self.held_out_history:
            return False
        values = [value for _, value in self.held_out_history]
        since = len(values) - 1 - values.index(min(values))
        return 0 < self._held_out.patience <= since

    def restore_best(self) -> None:
        """Put the best state back, if there is one."""
        with torch.no_grad():
            for name, value in self.best.items():
                self._parameters[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, beside ``best``; plain JSON."""
        return {
            "history": self.history, "held_out": self.held_out_history, "num_tokens": self.num_tokens,
            "lowest": self.lowest,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any], best: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        self.history = list(state["history"])
        self.held_out_history = [(step, value) for step, value in state["held_out"]]
        self.num_tokens, self.lowest = state["num_tokens"], state["lowest"]
        self.best = {name: value.to(self._parameters[name].device) for name, value in best.items()}


class Progress(TrainerCallback):
    """A bar on standard error with the current loss and the last held-out perplexity."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="recover", unit="step", file=sys.stderr
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            shown = {"loss": f"{self._recorder.history[-1]['loss']:.3f}"}
            if self._recorder.held_out_history:
                shown["held-out"] = f"{self._recorder.held_out_history[-1][1]:.2f}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def close(self) -> None:
        """End the bar, also after an exception."""
        if self._bar is not None:
            self._bar.close()
