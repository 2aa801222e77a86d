"""Is the engine as fast as a bare loop? ``python -m pruner_lib.recovery.benchmark``

The same LoRA on the same batches in the same order, once through ``recover`` and once in the
shortest loop one can write with PEFT and torch, in turns on the same machine. Both take the time from the
end of the first step to the end of the last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruner_lib.assets import DEFAULT_MODEL, load_calibration, load_model
from pruner_lib.recovery.adapters import linear_modules
from pruner_lib.recovery.recover import recover
from pruner_lib.recovery.settings import RecoverySettings
from pruner_lib.recovery.training import order_of_examples, own_random_state, quiet


@dataclass(frozen=True)
class SpeedComparison:
    """Tokens per second of both, one pair per repeat, and the losses they saw.

    Attributes:
        engine: of ``recover``.
        bare: of the bare loop.
        engine_losses: training loss per step.
        bare_losses: the same of the bare loop; equal up to rounding, as both did the same work.
    """

    engine: tuple[float, ...]
    bare: tuple[float, ...]
    engine_losses: tuple[float, ...]
    bare_losses: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the repeats of engine / bare, each pair taken one right after the other."""
        return statistics.median(a / b for a, b in zip(self.engine, self.bare, strict=True))

    def __str__(self) -> str:
        pairs = [f"{a:.0f} / {b:.0f}" for a, b in zip(self.engine, self.bare, strict=True)]
        ratios = [a / b for a, b in zip(self.engine, self.bare, strict=True)]
        return (
            f"recover runs at {self.ratio:.3f} × a bare PEFT loop (from {min(ratios):.3f} to "
            f"{max(ratios):.3f} in {len(ratios)} repeats; tokens per second: {', '.join(pairs)})"
        )


def compare_speed(
    model: nn.Module, ids: Tensor, *, settings: RecoverySettings, repeats: int = 3
) -> SpeedComparison:
    """Time ``recover`` and the bare loop in turns.

    Args:
        model: left as it is.
        ids: token ids ``[N, L]``.
        settings: LoRA, by steps, at least three of them.
        repeats: pairs.
    """
    settings = settings.on(next(model.parameters()).device)
    pairs: list[tuple[float, float]] = []
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    for number in range(repeats):
        runs = [_engine, _bare] if number % 2 == 0 else [_bare, _engine]
        found = {run: run(model, ids, settings) for run in runs}
        pairs.append((found[_engine][0], found[_bare][0]))
        losses = (found[_engine][1], found[_bare][1])
    tokens = (len(_steps(ids, settings)) - 1) * settings.batch_size * ids.shape[1]
    return SpeedComparison(
        tuple(tokens / engine for engine, _ in pairs), tuple(tokens / bare for _, bare in pairs),
        tuple(losses[0]), tuple(losses[1]),
    )  # fmt: skip


def _steps(ids: Tensor, settings: RecoverySettings) -> list[list[int]]:
    """Row numbers of each step, in the order that ``recover`` takes them."""
    size, count = settings.batch_size, settings.num_steps(len(ids))
    order = order_of_examples(len(ids), count * size, settings.seed)
    return [order[start : start + size] for start in range(0, count * size, size)]


def _engine(model: nn.Module, ids: Tensor, settings: RecoverySettings) -> tuple[float, Sequence[float]]:
    ends: list[float] = []
    result = recover(
        model, None, ids, settings=settings, progress=False,
        on_step=lambda record: ends.append(time.perf_counter()),
    )  # fmt: skip
    return ends[-1] - ends[0], result.losses


def _bare(model: nn.Module, ids: Tensor, settings: RecoverySettings) -> tuple[float, Sequence[float]]:
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    with own_random_state(settings.seed), quiet():
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=list(linear_modules(model)),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(copy.deepcopy(model), config).train()
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        steps = _steps(ids, settings)
        scheduler = get_scheduler("linear", optimizer, settings.num_warmup_steps(len(steps)), len(steps))
        device, ends, losses = next(model.parameters()).device, [], []
        parts = settings.batch_size // settings.micro_batch
        for rows in steps:
            total = 0.0
            for start in range(0, settings.batch_size, settings.micro_batch):
                batch = ids[rows[start : start + settings.micro_batch]].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bool(settings.bf16)):
                    loss = adapted(input_ids=batch, labels=batch, use_cache=False).loss / parts
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total)
            ends.append(time.perf_counter())
    return ends[-1] - ends[0], losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the engine is at least 0.95 times as fast, else 1."""
    parser = argparse.ArgumentParser(prog="python -m pruner_lib.recovery.benchmark", description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--steps", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, device=options.device)
    ids = load_calibration(tokenizer, source="c4", num_samples=32, seq_len=128)
    found = compare_speed(
        model, ids, settings=RecoverySettings(max_steps=options.steps), repeats=options.repeats
    )
    print(found)
    return 0 if found.ratio >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
