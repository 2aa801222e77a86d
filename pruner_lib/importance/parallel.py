"""Data parallelism on torch.distributed: every rank takes its rows, sums cover all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Share:
    """One process's part of the work; alone, it is all of it.

    Attributes:
        rank: which process.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Share:
        """The running process group's, as ``torchrun`` and ``init_process_group`` made it, if any."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def rows(self, batches: Tensor) -> Tensor:
        """Rows rank, rank + world, … of ``[N, L]``; there may be none."""
        return batches[self.rank :: self.world]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; every rank must call it, in the same order."""
        if self.world == 1:
            return tensor
        where = _communicable(tensor.device)
        moved = tensor.to(where)
        distributed.all_reduce(moved)
        return tensor if moved is tensor else tensor.copy_(moved)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all, instead of leaving the others waiting.

        Raises:
            RuntimeError: another rank failed; its own error says how.
        """
        try:
            yield
        except Exception:
            self.sum(torch.ones(1))
            raise
        failed = int(self.sum(torch.zeros(1)))
        if failed:
            raise RuntimeError(f"{failed} of {self.world} processes failed; the error is in their output")


def _communicable(device: torch.device) -> torch.device:
    """The device whose tensors the backend takes: NCCL wants those of a GPU."""
    if device.type == "cpu" and distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
