"""Seconds of a cut against copying the kept weights once, on the default model.

    python benchmarks/cutting.py --runs 3

The copy is the least any cut can do: every kept number is read and written once. Printed besides: where the
rest goes (the search for a configuration, the self-check), which does not grow with the width of the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from pruner_lib.assets import load_model
from pruner_lib.discovery import discover
from pruner_lib.pruning import plan_pruning, prune
from pruner_lib.pruning.configuration import find_blueprint, shapes_of
from pruner_lib.pruning.slicing import meta_copy, sliced_copy
from pruner_lib.pruning.verification import find_difference


def seconds(call: Callable[[], object], runs: int) -> float:
    """The least time of several runs: what the machine can do when nobody disturbs it."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--ratio", type=float, default=0.25)
    given = options.parse_args()
    model, _ = load_model(device="cpu", dtype="float32")
    dependencies = discover(model)
    scores = {family.name: torch.arange(family.size) for family in dependencies.families}
    plan = plan_pruning(dependencies, scores, ratio=given.ratio, uniform=True)
    pruned = prune(model, plan)
    copied = seconds(lambda: [parameter.detach().clone() for parameter in pruned.parameters()], given.runs)
    trial = sliced_copy(meta_copy(model), plan)
    parts = {
        "whole cut": lambda: prune(model, plan),
        "slicing": lambda: sliced_copy(model, plan),
        "configuration": lambda: find_blueprint(model, plan, shapes_of(trial)),
        "self-check": lambda: find_difference(trial, plan),
    }
    print(f"copying the kept weights {copied:.3f} s")
    for name, call in parts.items():
        took = seconds(call, given.runs)
        print(f"{name:<24} {took:.3f} s  {took / copied:.1f} × the copy")


if __name__ == "__main__":
    main()
