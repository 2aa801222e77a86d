"""transformers' Trainer as the engine; imported only where training begins, since that takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from pruner_lib.recovery import checkpoints
from pruner_lib.recovery.data import Example, collate
from pruner_lib.recovery.training import Objective, order_of_examples


class Arguments(TrainingArguments):
    """Names the model's device, where the trainer's own take the first GPU."""

    where: torch.device | None = None

    @property
    def device(self) -> torch.device:
        first = super().device  # asked in any case: it sets up the processes, too
        return self.where or first


class Engine(Trainer):
    """transformers' Trainer with this package's loss, order of data and checkpoints."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, examples: Sequence[Example], objective: Objective,
        *, pad_token: int, callbacks: list[Any],
    ) -> None:  # fmt: skip
        def batch(items: Sequence[tuple[int, Example]]) -> dict[str, Tensor]:
            rows = torch.tensor([number for number, _ in items])
            return {**collate([example for _, example in items], pad_token), "rows": rows}

        super().__init__(
            model=model,
            args=args,
            train_dataset=_Numbered(examples),
            data_collator=batch,
            compute_loss_func=objective,  # makes the trainer count the step's predicted tokens
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._order = order_of_examples(len(examples), args.max_steps * step, args.seed)
        self._restored: checkpoints.Restored | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return _Order(self._order)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective; data-parallel training averages over processes, so each gives its share n-fold."""
        assert self.compute_loss_func is not None
        return self.compute_loss_func(model, dict(inputs), num_items_in_batch) * self.args.world_size

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads the count, and taking it walks through all modules at every micro-batch."""
        return 0

    def run(self, restored: checkpoints.Restored | None) -> None:
        """Train from the start, or from a checkpoint as if nothing had happened."""
        self._restored = restored
        self.train(resume_from_checkpoint=None if restored is None else str(restored.folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._restored is not None
        self._restored.load_weights(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._restored is not None:
            self._restored.load_optimizer(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._restored is not None:
            self._restored.load_random_state(self.args.process_index)


class _Numbered(torch.utils.data.Dataset):
    """Examples with their numbers, as the data set the trainer wants."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self._examples[index]


class _Order(torch.utils.data.Sampler[int]):
    """An order that is already known."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
