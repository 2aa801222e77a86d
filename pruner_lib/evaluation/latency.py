"""Time to first token and tokens per second, of several models in one run."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.evaluation.cost import count_cost
from pruner_lib.evaluation.running import (
    EvaluationError,
    check_context,
    check_counts,
    check_device,
    check_models,
    evaluating,
    input_device,
    last_logits,
    require_cache,
    require_weights,
    vocabulary_size,
)
from pruner_lib.evaluation.tables import html_table, markdown_table, text_table

_WIDE = 0.25  # relative spread from which a time says little


@dataclass(frozen=True)
class Latency:
    """Times of one model at one batch size and prompt length.

    Attributes:
        model: name of the model.
        batch_size: sequences at once.
        prompt_len: tokens of each prompt.
        first_token: median seconds from the prompt to the first new token.
        first_token_spread: interquartile range of these, in seconds.
        tokens_per_second: median rate of the tokens after the first, over the whole batch.
        tokens_per_second_spread: interquartile range of these.
        first_token_ratio: first_token / that of the first model in the same run.
        speed_ratio: tokens_per_second / that of the first model.
        macs_ratio: multiply-accumulates of the prompt / those of the first model: what first_token_ratio
            would be if time followed them.
        token_macs_ratio: the same for one decoded token, looking back at the cache left out: 1 / what
            speed_ratio would be.
    """

    model: str
    batch_size: int
    prompt_len: int
    first_token: float
    first_token_spread: float
    tokens_per_second: float
    tokens_per_second_spread: float
    first_token_ratio: float
    speed_ratio: float
    macs_ratio: float
    token_macs_ratio: float = 1.0

    @property
    def promise_kept(self) -> float | None:
        """Time saved to the first token / time that the multiply-accumulates promise to save.

        1 when time follows them, 0 when the smaller model is no faster; None where nothing is promised.
        """
        promised = 1.0 - self.macs_ratio
        return (1.0 - self.first_token_ratio) / promised if promised > 0.005 else None

    @property
    def spread(self) -> float:
        """The wider of the two interquartile ranges, relative to its median."""
        return max(
            self.first_token_spread / self.first_token, self.tokens_per_second_spread / self.tokens_per_second
        )


@dataclass(frozen=True)
class LatencyTable:
    """Times of several models, taken in turns.

    Attributes:
        rows: batch size by batch size, prompt length by prompt length, model by model.
        conditions: repeats, new tokens, device, threads.
    """

    rows: tuple[Latency, ...]
    conditions: str

    _HEADER = (
        "model", "batch", "prompt", "first token", "ratio", "MACs say", "tokens/s", "ratio", "MACs say"
    )  # fmt: skip

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of cells."""
        return list(self._HEADER), [
            [
                row.model, str(row.batch_size), str(row.prompt_len),
                f"{row.first_token * 1e3:.1f} ± {row.first_token_spread * 1e3:.1f} ms",
                f"{row.first_token_ratio:.2f}", f"{row.macs_ratio:.2f}",
                f"{row.tokens_per_second:.1f} ± {row.tokens_per_second_spread:.1f}", f"{row.speed_ratio:.2f}",
                f"{1 / row.token_macs_ratio:.2f}",
            ]
            for row in self.rows
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{text_table(*self.table())}\n({self.conditions})"

    def _repr_html_(self) -> str:
        return html_table(*self.table(), self.conditions)

    def to_markdown(self) -> str:
        """A GitHub table with the conditions below it."""
        return f"{markdown_table(*self.table())}\n\n{self.conditions}"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LatencyTable:
        """The inverse of ``dataclasses.asdict``."""
        return cls(tuple(Latency(**row) for row in content["rows"]), content["conditions"])


def measure_latency(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] = (64,),
    new_tokens: int = 16,
    repeats: int = 5,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> LatencyTable:
    """Time every model on the same random prompts.

    The models take turns, one run each per repeat, so that a machine that grows busy or hot slows
    them alike. One unmeasured run of each comes first. Decoding is greedy with the KV cache and
    never stops at an end token.

    Args:
        models: by name; the first is what ratios are taken to.
        batch_sizes: sequences at once.
        prompt_lengths: tokens of each prompt.
        new_tokens: tokens to decode, at least 2: the first is timed apart from the others.
        repeats: measured runs; times are medians, spreads interquartile ranges.
        seed: of the prompts.
        device: where the models must be, such as ``cuda``; None takes them where they are.

    Returns:
        Median, spread and ratio per model, batch size and prompt length. Warns where a
        spread is above a quarter of its median, and says how busy the machine was.

    Raises:
        EvaluationError: no models, a number below its minimum, a prompt beyond a model's context, models
            on different devices or on another than asked for, a model without a KV cache.
    """
    checked = check_models(models)
    minima = {"new_tokens": (new_tokens, 2), "repeats": (repeats, 1)}
    minima |= {f"batch size {size}": (size, 1) for size in batch_sizes}
    minima |= {f"prompt length {length}": (length, 1) for length in prompt_lengths}
    check_counts(minima)
    where = input_device(next(iter(checked.values())))
    for name, model in checked.items():
        require_weights(model, f"measuring the latency of {name!r}")
        check_device(model, device)
        if input_device(model) != where:
            raise EvaluationError(
                f"{name!r} is on {input_device(model)}, the first model on {where}: times on different "
                "devices cannot be compared; move them to one"
            )
        tokens = max(prompt_lengths, default=0) + new_tokens
        check_context(model, tokens, f"prompt and new tokens of {name!r}")
        require_cache(model, f"measuring the latency of {name!r}")
    busy = _other_load()
    rows: list[Latency] = []
    for batch_size, prompt_len in product(batch_sizes, prompt_lengths):
        vocabulary = min(vocabulary_size(model) or 1 for model in checked.values())
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(vocabulary, (batch_size, prompt_len), generator=generator)
        runs = _take_turns(checked, prompt, new_tokens, repeats)
        macs = {name: _macs(model, batch_size, prompt_len) for name, model in checked.items()}
        rows += _rows(runs, macs, prompt)
    _warn_when_wide(rows, busy)
    conditions = (
        f"median ± interquartile range of {repeats} runs in turns, {new_tokens} new tokens, on {where.type}"
    )
    if where.type == "cpu":
        conditions += f" with {torch.get_num_threads()} threads"
    return LatencyTable(tuple(rows), conditions)


def _macs(model: nn.Module, batch_size: int, prompt_len: int) -> tuple[int, int]:
    """Multiply-accumulates of the prompts, and of one token after them."""
    of_prompt = count_cost(model, batch_size=batch_size, seq_len=prompt_len).macs
    return of_prompt, count_cost(model, batch_size=batch_size, seq_len=1).macs


def _other_load() -> str:
    """Words for a machine that is busy before the run has begun; empty when it is not."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f" (the load was {load:.1f} on {cores} cores before the run)" if load > 0.5 * cores else ""


def _take_turns(
    models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds to the first token, tokens per second after it) of every run of every model."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            with evaluating(model):
                times = _decode(model, prompt, new_tokens)
            if repeat:  # the first round only warms up
                runs[name].append(times)
    return runs


def _decode(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    tokens, options = prompt.to(input_device(model)), last_logits(model)
    _wait(tokens.device)
    start = time.perf_counter()
    out = model(input_ids=tokens, use_cache=True, **options)
    latest = out.logits[:, -1:].argmax(-1)
    _wait(tokens.device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = model(input_ids=latest.to(tokens.device), past_key_values=out.past_key_values, use_cache=True)
        latest = out.logits[:, -1:].argmax(-1)
    _wait(tokens.device)
    return first - start, (new_tokens - 1) * len(prompt) / (time.perf_counter() - first)


def _wait(device: torch.device) -> None:
    """Kernels run on their own; a clock read before they end measures nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _rows(
    runs: Mapping[str, list[tuple[float, float]]], macs: Mapping[str, tuple[int, int]], prompt: Tensor
) -> list[Latency]:
    medians = {
        name: (statistics.median(t for t, _ in times), statistics.median(rate for _, rate in times))
        for name, times in runs.items()
    }
    reference = next(iter(runs))
    return [
        Latency(
            model=name,
            batch_size=prompt.shape[0],
            prompt_len=prompt.shape[1],
            first_token=medians[name][0],
            first_token_spread=_quartile_range([t for t, _ in times]),
            tokens_per_second=medians[name][1],
            tokens_per_second_spread=_quartile_range([rate for _, rate in times]),
            first_token_ratio=medians[name][0] / medians[reference][0],
            speed_ratio=medians[name][1] / medians[reference][1],
            macs_ratio=macs[name][0] / macs[reference][0],
            token_macs_ratio=macs[name][1] / macs[reference][1],
        )
        for name, times in runs.items()
    ]


def _quartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _warn_when_wide(rows: Sequence[Latency], busy: str) -> None:
    wide = [f"{row.model} ({row.spread:.0%})" for row in rows if row.spread > _WIDE]
    if wide:
        warnings.warn(
            f"times vary widely between repeats: {', '.join(wide)} of the median; the machine is busy{busy} "
            "or the runs are short. Close other work, or raise repeats and new_tokens",
            stacklevel=3,
        )
