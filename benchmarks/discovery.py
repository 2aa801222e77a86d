"""Time and memory of discovery, from configurations alone, and beside Torch-Pruning.

    python benchmarks/discovery.py                 # everything: a few minutes on two cores
    python benchmarks/discovery.py --only 7b 70b   # some rows

Every row runs in a process of its own, so that its peak memory is its own. ``discover`` is timed after
one run on a tiny model (torch loads its meta kernels on first use); ``cpu s`` is processor time, which
other work on the machine does not lengthen. Torch-Pruning needs weights and gradients; its time is that
of its graph and of the groups it reads out of it, because only then does it know what ``discover`` returns.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings

SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
ROWS: dict[str, dict[str, int]] = {
    "7b": {},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "7b, 8 layers": {"num_hidden_layers": 8},
    "7b, 16 layers": {"num_hidden_layers": 16},
    "7b, 64 layers": {"num_hidden_layers": 64},
    "7b, half the width": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16},
    "7b, twice the width": {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64},
    "small": SMALL,
}


def measure(row: str) -> dict[str, float]:
    """Seconds, processor seconds and peak GiB of one discovery on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pruner_lib.discovery import discover

    torch.set_num_threads(2)
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        discover(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **tiny)))
        model = AutoModelForCausalLM.from_config(LlamaConfig(**ROWS[row]))
    wall, cpu = time.perf_counter(), time.process_time()
    found = discover(model)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu s": time.process_time() - cpu,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "families": len(found.families),
        "groups": sum(family.size for family in found.families),
    }


def compare() -> dict[str, float]:
    """Processor seconds on one small Llama with weights, discovery and Torch-Pruning in turn."""
    import torch
    import torch_pruning
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pruner_lib.discovery import discover

    torch.set_num_threads(1)
    config = LlamaConfig(vocab_size=4096, attn_implementation="eager", use_cache=False, **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    discover(model)
    start = time.process_time()
    discover(model)
    ours = time.process_time() - start
    inputs = {"input_ids": torch.arange(5)[None]}
    start = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)
    built = time.process_time() - start
    for _ in graph.get_all_groups(root_module_types=[torch.nn.Linear, torch.nn.Embedding]):
        pass
    theirs = time.process_time() - start
    return {"discover": ours, "their graph": built, "their graph and groups": theirs, "ratio": theirs / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of discovery")
    parser.add_argument("--only", nargs="*", default=[*ROWS, "torch-pruning"], help="rows to run")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.row:
        print(json.dumps(compare() if given.row == "torch-pruning" else measure(given.row)))
        return
    for row in given.only:
        command = [sys.executable, __file__, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        print(f"{row:<20}" + "  ".join(f"{name} {value:,.4g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
