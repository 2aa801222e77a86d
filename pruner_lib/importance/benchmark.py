"""What importance costs: time against bare passes, memory against the weights.

python -m pruner_lib.importance.benchmark --out docs/importance
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.assets.files import write_whole
from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.importance.calibration import progress_bar, token_losses, untouched
from pruner_lib.importance.chain import decoder_layers
from pruner_lib.importance.estimate import estimate_importance
from pruner_lib.importance.gradients import handing_over

BLOCKS = ("attention_head", "mlp_neuron")
Run = Callable[[], Any]


def bare_forward(model: nn.Module, batches: Tensor) -> None:
    """The loss and nothing else."""
    with torch.no_grad():
        token_losses(model, batches)


def bare_backward(model: nn.Module, batches: Tensor, names: Sequence[str]) -> None:
    """The loss and the gradients of some parameters, kept as training keeps them."""
    with untouched(model, names), torch.enable_grad():
        token_losses(model, batches).mean().backward()


def passing_backward(model: nn.Module, batches: Tensor, names: Sequence[str]) -> None:
    """The same, each gradient freed at once: what weights and activations alone need."""
    with untouched(model, names) as wanted, torch.enable_grad(), handing_over(wanted, lambda name, g: None):
        token_losses(model, batches).mean().backward()


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes that a run holds at once beyond what was there before, the allocator's own count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, size in steps:
        held += size
        peak = max(peak, held)
    return peak


def seconds(run: Run, device: torch.device, clock: str = "wall") -> float:
    """Time of one run: on the wall, or of this process's CPUs, which other processes hardly disturb."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def cases(model: nn.Module, dependencies: DependencyMap, batches: Tensor) -> dict[str, tuple[str, Run]]:
    """What is measured: name to (the bare pass it is compared with, the run)."""
    names = [name for name, _ in model.named_parameters()]
    blocks = [family.name for family in dependencies.select(BLOCKS)]

    def scored(**options: Any) -> Run:
        return lambda: estimate_importance(
            model, dependencies, batches, **{"families": blocks, "criterion": "taylor_first", **options}
        )

    half = max(1, len(batches) // 2)
    found: dict[str, tuple[str, Run]] = {
        "forward": ("forward", lambda: bare_forward(model, batches)),
        "forward + backward": ("forward + backward", lambda: bare_backward(model, batches, names)),
        "taylor_first, heads and neurons": ("forward + backward", scored()),
        "taylor_first, all families": ("forward + backward", scored(families=None)),
        "taylor_second, heads and neurons": ("forward + backward", scored(criterion="taylor_second")),
    }
    for way in ("layers", "gradients"):
        title = f"taylor_first, two micro-batches, {way}"
        found[title] = ("forward + backward", scored(micro_batch_size=half, accumulate=way))
    for criterion in ("wanda", "fluctuation", "activation"):
        found[criterion] = ("forward", scored(criterion=criterion))
    return found


def measure(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor,
    *,
    repeats: int = 5,
    clock: str = "wall",
    progress: bool | None = None,
) -> dict[str, Any]:
    """Times, as medians of ratios within a round, and extra memory as a share of the weights.

    Args:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]``.
        repeats: rounds; each runs every case once, so that a slow moment hits all alike.
        clock: ``"wall"``, or ``"cpu"`` for CPU time, on a machine that does other things besides.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        JSON-ready: ``settings``, and ``cases`` with name → ``seconds``, ``ratio``, ``spread`` (lowest and
        highest ratio) and ``extra_share``, as :func:`extra_memory` has it.
    """
    device = next(model.parameters()).device
    runs = cases(model, dependencies, batches)
    bare_backward(model, batches, [name for name, _ in model.named_parameters()])  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    with progress_bar(repeats * len(runs), "timing", progress) as bar:
        for _ in range(repeats):
            for name, (_, run) in runs.items():
                times[name].append(seconds(run, device, clock))
                bar.set_postfix_str(f"{name}: {times[name][-1]:.2f} s")
                bar.update()
    extra = extra_memory(model, batches, runs, progress)
    results = {}
    for name, (against, _) in runs.items():
        ratios = [mine / other for mine, other in zip(times[name], times[against], strict=True)]
        results[name] = {
            "against": against,
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "extra_share": extra[name],
        }
    settings = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "batches": list(batches.shape),
        "clock": clock,
        "repeats": repeats,
    }
    return {"settings": settings, "cases": results}


def extra_memory(
    model: nn.Module, batches: Tensor, runs: Mapping[str, tuple[str, Run]], progress: bool | None = None
) -> dict[str, float]:
    """Peak memory of each run beyond weights and activations, as a share of the weights' bytes.

    Weights and activations are what a bare pass holds whose weight gradients are freed at once. It
    makes none for embeddings, whose gradient, if tied, is incomplete until the very end.
    """
    device = next(model.parameters()).device
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    inside = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
    floors = {
        "forward": peak_bytes(lambda: bare_forward(model, batches), device),
        "forward + backward": peak_bytes(lambda: passing_backward(model, batches, names), device),
    }
    found = {}
    with progress_bar(len(runs), "memory", progress) as bar:
        for name, (against, run) in runs.items():
            found[name] = (peak_bytes(run, device) - floors[against]) / weights
            bar.set_postfix_str(f"{name}: {100 * found[name]:.1f} %")
            bar.update()
    return found


def as_markdown(measured: Mapping[str, Any], model: str) -> str:
    """The table of the documentation."""
    settings = measured["settings"]
    samples, length = settings["batches"]
    clock = "Wall-clock time" if settings["clock"] == "wall" else "CPU time"
    lines = [
        "# What importance costs",
        "",
        f"{model} ({settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}), "
        f"{samples} × {length} tokens, {settings['device']} with {settings['threads']} threads. "
        f"{clock} is against the bare pass in the same round, the median of {settings['repeats']} rounds "
        "with the lowest and highest. Extra memory is what a run holds at its peak beyond a bare pass that "
        "keeps no weight gradient (so beyond weights and activations), as a share of the weights.",
        "",
        "| run | seconds | against | time ratio | lowest–highest | extra memory / weights |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in measured["cases"].items():
        low, high = row["spread"]
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['against']} | {row['ratio']:.2f} | "
            f"{low:.2f}–{high:.2f} | {100 * row['extra_share']:.1f} % |"
        )
    command = "`python -m pruner_lib.importance.benchmark --out docs/importance`"
    return "\n".join([*lines, "", f"Made by {command}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; writes ``benchmark.json`` and ``benchmark.md``."""
    from pruner_lib.assets import DEFAULT_MODEL, load_calibration, load_model

    parser = argparse.ArgumentParser(prog="python -m pruner_lib.importance.benchmark", description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 … (default: as load_model)")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("runs/importance"), help="folder for the results")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, device=options.device, dtype=options.dtype)
    batches = load_calibration(
        tokenizer, source="books", num_samples=options.samples, seq_len=options.seq_len, seed=0
    )
    measured = measure(
        model, discover(model), batches, repeats=options.repeats, clock=options.clock, progress=True
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "benchmark.json", json.dumps(measured, indent=2) + "\n")
    page = as_markdown(measured, os.path.basename(options.model))
    write_whole(options.out / "benchmark.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
