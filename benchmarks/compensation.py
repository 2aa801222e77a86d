"""What compensation costs: seconds and memory, and how they grow with width, layers and tokens.

    python benchmarks/compensation.py              # random Llamas of growing size, then the default model
    python benchmarks/compensation.py --no-default

A quarter of the neurons and KV heads of each layer goes; every case runs in a process of its own. Memory is
what that process needed at most (resident set) beyond what it held before: the dense and the pruned model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib import discover, load_calibration, load_model, plan_pruning, prune
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


def measured(case: Case) -> dict[str, float]:
    model, text = model_and_text(case)
    dependencies = discover(model)
    scores = {f.name: torch.rand(f.size) for f in dependencies.families}
    plan = plan_pruning(dependencies, scores, ratio=0.25, kinds=("attention_head", "mlp_neuron"))
    pruned = prune(model, plan)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    compensate(model, pruned, plan, text)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    both = sum(p.numel() * p.element_size() for m in (model, pruned) for p in m.parameters())
    return {"seconds": seconds, "mebibytes": grown / 1024, "both": both / 2**20}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--no-default", action="store_true", help="leave out the default model")
    options.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.case is not None:
        print(json.dumps(measured(Case(**given.case))))
        return
    print("| width | layers | tokens | seconds | memory beyond the two models | the two models |")
    print("|---:|---:|---:|---:|---:|---:|")
    for case in GROWING + ([] if given.no_default else DEFAULT):
        command = [sys.executable, str(Path(__file__)), "--case", json.dumps(asdict(case))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {case.width or 'SmolLM2, 576'} | {case.layers} | {case.windows * LENGTH:,} | "
            f"{found['seconds']:.1f} | {found['mebibytes']:,.0f} MiB | {found['both']:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
