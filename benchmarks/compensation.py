"""What compensation costs, and the whole recipe: seconds and memory, as width, layers and tokens grow.

    python benchmarks/compensation.py              # random Llamas of growing size, then the default model
    python benchmarks/compensation.py --no-default
    python benchmarks/compensation.py --only recipe      # the second table

First the fit alone, with a quarter of the neurons and KV heads of each layer gone; then all that leads from a
dense model to a compensated one of 80 % of its parameters: discovery, scores from a quarter of the text,
costs measured on a thirty-second of it after a fit on half of it, plan, cut, fit on all of it. Every
case runs in a process of its own. Memory is what that process needed at most (resident set) beyond what
it held before: the dense model, and for the fit alone the pruned one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib import (
    discover,
    estimate_importance,
    load_calibration,
    load_model,
    plan_pruning,
    prune,
    scale_to_loss,
)
from pruner_lib.pruning import compensate

LENGTH = 128


@dataclass(frozen=True)
class Case:
    """A model and a text; ``width`` 0 is the default model on WikiText-2."""

    width: int = 256
    layers: int = 8
    windows: int = 32


BASE = Case()
GROWING = [
    BASE,
    *(replace(BASE, width=width) for width in (512, 1024)),
    *(replace(BASE, layers=layers) for layers in (16, 32)),
    *(replace(BASE, windows=windows) for windows in (64, 128)),
]
DEFAULT = [Case(0, 30, windows) for windows in (32, 64)]
WHOLE_DEFAULT = [Case(0, 30, windows) for windows in (64, 256)]
KINDS = ("attention_head", "mlp_neuron")
STAGES = ("discovery", "scores", "costs", "plan and cut", "fit")


def model_and_text(case: Case) -> tuple[nn.Module, torch.Tensor]:
    if not case.width:
        model, tokenizer = load_model(device="cpu", dtype="float32")
        text = load_calibration(
            tokenizer, source="wikitext2", num_samples=case.windows, seq_len=LENGTH, seed=0
        )
        return model, text
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.width, intermediate_size=4 * case.width, num_hidden_layers=case.layers,
        vocab_size=512, num_attention_heads=case.width // 32, num_key_value_heads=case.width // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(512, (case.windows, LENGTH))


def held() -> int:
    """The most memory that this process has held, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mebibytes(*models: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 2**20


def the_fit(case: Case) -> dict[str, float]:
    model, text = model_and_text(case)
    dependencies = discover(model)
    scores = {f.name: torch.rand(f.size) for f in dependencies.families}
    plan = plan_pruning(dependencies, scores, ratio=0.25, kinds=KINDS)
    pruned = prune(model, plan)
    before, start = held(), time.perf_counter()
    compensate(model, pruned, plan, text)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": (held() - before) / 1024, "models": mebibytes(model, pruned)}


def the_recipe(case: Case) -> dict[str, float]:
    model, text = model_and_text(case)
    before, times = held(), [time.perf_counter()]

    def done() -> None:
        times.append(time.perf_counter())

    dependencies = discover(model)
    done()
    families = dependencies.select(kind=KINDS)
    part = text[: len(text) // 4]
    scores = estimate_importance(model, dependencies, part, criterion="wanda", families=families)
    done()
    few, half = text[: max(2, len(text) // 32)], text[len(text) // 2 :]
    shares = {"ratio": (1 / 3, 2 / 3), "measure": "divergence", "compensate": half}
    nats = scale_to_loss(model, dependencies, scores, few, **shares)
    done()
    plan = plan_pruning(dependencies, nats, target_params=0.8, preset="best")
    pruned = prune(model, plan)
    done()
    compensate(model, pruned, plan, text)
    done()
    seconds = dict(zip(STAGES, [b - a for a, b in pairwise(times)], strict=True))
    return {**seconds, "memory": (held() - before) / 1024, "models": mebibytes(model)}


MEASURES = {"fit": the_fit, "recipe": the_recipe}


def in_a_process(what: str, case: Case) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--case", json.dumps([what, asdict(case)])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(head: list[str], what: str, cases: list[Case]) -> None:
    """One table."""
    print("| " + " | ".join(["width", "layers", "tokens", *head]) + " |")
    print("|" + "---:|" * (3 + len(head)), flush=True)
    for case in cases:
        *seconds, memory, models = in_a_process(what, case).values()
        cells = [str(case.width or "SmolLM2, 576"), str(case.layers), f"{case.windows * LENGTH:,}"]
        total = [sum(seconds)] if len(seconds) > 1 else []
        cells += [f"{each:.1f}" for each in [*seconds, *total]] + [f"{memory:,.0f} MiB", f"{models:,.0f} MiB"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--no-default", action="store_true", help="leave out the default model")
    options.add_argument("--only", choices=MEASURES, help="one of the two tables")
    options.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.case is not None:
        what, case = given.case
        print(json.dumps(MEASURES[what](Case(**case))))
        return
    default, whole = ([], []) if given.no_default else (DEFAULT, WHOLE_DEFAULT)
    if given.only != "recipe":
        show(["seconds", "memory beyond the two models", "the two models"], "fit", GROWING + default)
        print()
    if given.only != "fit":
        head = [f"{stage}, s" for stage in STAGES]
        show([*head, "all, s", "memory beyond the model", "the model"], "recipe", GROWING + whole)


if __name__ == "__main__":
    main()
