"""Seconds of a cut against copying the kept weights once.

    python benchmarks/cutting.py                      # the default model, and a random Llama of 1.2 B
    python benchmarks/cutting.py --models smollm2 --runs 5

The copy is the least any cut can do: every kept number is read and written once. The rest (the search for a
configuration, the self-check) is work on shapes, which does not grow with the width of the model; it
grows with the number of layers of different sorts, so a plan whose layers all differ is timed too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from pruner_lib.assets import load_model
from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.pruning import PruningPlan, plan_pruning, prune
from pruner_lib.pruning.configuration import find_blueprint, follow_blueprint, shapes_of
from pruner_lib.pruning.slicing import sliced_copy, sliced_meta_copy
from pruner_lib.pruning.verification import find_difference

BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}


def default_model() -> nn.Module:
    return load_model(device="cpu", dtype="float32")[0]


def billion() -> nn.Module:
    """Llama 3.2's shape of 1.2 B, tied; the values do not matter to a cut."""
    config = LlamaConfig(**BILLION, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    model.tie_weights()  # what to_empty undoes
    return model


MODELS = {"smollm2": default_model, "llama-1b": billion}


def plans(dependencies: DependencyMap, ratio: float) -> dict[str, PruningPlan]:
    """One width in all layers, and a width of its own in every layer."""
    generator = torch.Generator().manual_seed(0)
    scores = {f.name: torch.rand(f.size, generator=generator) for f in dependencies.families}
    return {
        "one width": plan_pruning(dependencies, scores, ratio=ratio, uniform=True),
        "every layer its own": plan_pruning(dependencies, scores, ratio=ratio, scope="global"),
    }


CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}  # cpu: for a machine that does other things, too


def seconds(call: Callable[[], object], runs: int, clock: str = "wall") -> float:
    """The least time of several runs: what the machine can do when nobody disturbs it."""
    times = []
    for _ in range(runs):
        start = CLOCKS[clock]()
        call()
        times.append(CLOCKS[clock]() - start)
    return min(times)


def report(model: nn.Module, plan: PruningPlan, runs: int, clock: str) -> None:
    pruned = prune(model, plan)
    copied = seconds(lambda: [parameter.detach().clone() for parameter in pruned.parameters()], runs, clock)
    trial = sliced_meta_copy(model, plan)
    found = find_blueprint(model, plan, shapes_of(trial))
    if found is not None:
        follow_blueprint(trial, found[0].model, found[1].model)
    parts = {
        "whole cut": lambda: prune(model, plan),
        "slicing": lambda: sliced_copy(model, plan),
        "configuration": lambda: find_blueprint(model, plan, shapes_of(trial)),
        "self-check": lambda: find_difference(trial, plan),
    }
    print(f"  copying the kept weights {copied:.3f} s")
    for name, call in parts.items():
        took = seconds(call, runs, clock)
        print(f"  {name:<24} {took:.3f} s  {took / copied:.1f} × the copy")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--ratio", type=float, default=0.25)
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    given = options.parse_args()
    if given.clock == "cpu":
        torch.set_num_threads(1)
    for name in given.models:
        model = MODELS[name]()
        for kind, plan in plans(discover(model), given.ratio).items():
            print(f"{name}, {kind}: {plan.params_before / 1e6:,.0f} -> {plan.params_after / 1e6:,.0f} M")
            report(model, plan, given.runs, given.clock)


if __name__ == "__main__":
    main()
