"""How much memory a model needs at its worst moment: counted from the allocations themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.evaluation.running import (
    EvaluationError,
    check_context,
    check_counts,
    evaluating,
    input_device,
    last_logits,
    require_cache,
    require_weights,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors while a model reads prompts and writes one token.

    Attributes:
        weight_bytes: parameters and buffers, held all the time (the memory of the paper's tables).
        peak_bytes: all tensors alive at the worst moment: weights, KV cache, activations, logits.
        batch_size: prompts at once.
        prompt_len: tokens of each.
        device: ``cpu`` or ``cuda``.
    """

    weight_bytes: int
    peak_bytes: int
    batch_size: int
    prompt_len: int
    device: str

    @property
    def working_bytes(self) -> int:
        """What is needed beyond the weights."""
        return self.peak_bytes - self.weight_bytes

    def __str__(self) -> str:
        return (
            f"{self.peak_bytes / 2**20:,.1f} MiB at the peak, {self.weight_bytes / 2**20:,.1f} of it weights "
            f"({self.conditions})"
        )

    @property
    def conditions(self) -> str:
        """Batch, prompt and device in one line."""
        return (
            f"peak memory at {self.batch_size} × {self.prompt_len} tokens and one new one, on {self.device}"
        )


def measure_memory(model: nn.Module, *, batch_size: int = 1, prompt_len: int = 64) -> Memory:
    """Peak memory of inference: read ``batch_size`` prompts into the KV cache, then decode one token.

        peak = weights + max_t Σ (bytes of tensors that are alive at time t and were made by the run)

    On a GPU the caching allocator counts; on the CPU each allocation and release is taken from torch's
    profiler. Both count tensors, not the process: Python, libraries and memory that the allocator keeps
    for later are not in it. The result is the same in every run, however busy the machine is.

    >>> measure_memory(model, prompt_len=128).peak_bytes  # doctest: +SKIP
    546218496

    Args:
        model: a causal language model with weights; left as it was.
        batch_size: prompts at once.
        prompt_len: tokens of each prompt.

    Raises:
        EvaluationError: a number below 1, a prompt beyond the context, a model on the meta device, on a
            device whose allocations torch does not report, or without a KV cache.
    """
    require_weights(model, "measuring memory")
    check_counts({"batch_size": (batch_size, 1), "prompt_len": (prompt_len, 1)})
    check_context(model, prompt_len + 1, "prompt_len and one new token")
    device = input_device(model)
    if device.type not in ("cpu", "cuda"):
        raise EvaluationError(
            f"torch reports no allocations on {device.type}; move the model to the CPU or to CUDA"
        )
    require_cache(model, "measuring memory")
    resident = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in resident)
    prompt = torch.zeros((batch_size, prompt_len), dtype=torch.long, device=device)
    with evaluating(model):
        _read_and_write(model, prompt[:, :1])  # what is made once and kept is not the run's
        peak = _allocated_by(lambda: _read_and_write(model, prompt), device)
    return Memory(weights, weights + peak, batch_size, prompt_len, device.type)


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """The profiler's library writes two lines to the terminal at each use unless told not to."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _read_and_write(model: nn.Module, prompt: Tensor) -> None:
    out = model(input_ids=prompt, use_cache=True, **last_logits(model))
    latest = out.logits[:, -1:].argmax(-1)
    model(input_ids=latest, past_key_values=out.past_key_values, use_cache=True)


def _allocated_by(run: Callable[[], Any], device: torch.device) -> int:
    """Highest sum of the bytes that ``run`` has allocated and not yet released."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent_profiler(), torch.profiler.profile(activities=cpu, profile_memory=True) as record:
        run()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return int(peak)
