"""What each criterion makes of the plan of notebook 03: ``python studies/criteria.py``

A quarter of the heads and neurons of layers 4 to 26 goes, chosen from 10 × 64 tokens of books (the
paper's setting), several draws of them. Every row is of one size, so perplexity tells the criteria apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pruner_lib as pl
from pruner_lib.assets.files import write_whole

CRITERIA = ("taylor_second", "activation", "taylor_first", "taylor_vector", "wanda", "l2", "random")
KINDS, LAYERS, RATIO = ("attention_head", "mlp_neuron"), range(4, 27), 0.25


def measure(criteria: Sequence[str], seeds: Sequence[int], test_tokens: int) -> dict[str, Any]:
    """Perplexity of the dense model, and per criterion of each draw, with the seconds that scoring took."""
    model, tokenizer = pl.load_model()
    dependencies, text = pl.discover(model), pl.load_text("wikitext2", "test")
    families = dependencies.select(kind=KINDS, layers=LAYERS)
    options = {"seq_len": 128, "max_tokens": test_tokens, "source": "wikitext2 test"}
    found: dict[str, Any] = {"dense": float(pl.perplexity(model, tokenizer, text, **options))}
    for criterion in criteria:
        found[criterion] = []
        for seed in seeds:
            batches = pl.load_calibration(tokenizer, **pl.PAPER_CALIBRATION, seed=seed)
            how = {"criterion": criterion, "families": families, "seed": seed}
            begun = time.perf_counter()
            scores = pl.estimate_importance(model, dependencies, batches, **how)
            seconds = time.perf_counter() - begun
            plan = pl.plan_pruning(dependencies, scores, ratio=RATIO, layers=LAYERS, kinds=KINDS)
            quality = pl.perplexity(pl.prune(model, plan), tokenizer, text, **options)
            found[criterion].append((float(quality), seconds))
            print(f"{criterion}, seed {seed}: {float(quality):.1f}, scored in {seconds:.1f} s", flush=True)
        found["params"] = plan.params_after
    return found


def page(found: dict[str, Any], seeds: Sequence[int], test_tokens: int) -> str:
    """The page of the documentation."""
    rows = [
        f"| {name} | {', '.join(f'{quality:.0f}' for quality, _ in draws)} | {min(s for _, s in draws):.1f} |"
        for name, draws in found.items()
        if isinstance(draws, list)
    ]
    lines = [
        "# What criteria make of one plan",
        "",
        f"Written by `python studies/criteria.py`: {RATIO:.0%} of heads and neurons of layers {LAYERS[0]} "
        f"to {LAYERS[-1]}, {found['params']:,} parameters left, scored on 10 × 64 tokens of books, seeds "
        f"{', '.join(map(str, seeds))}. Perplexity on {test_tokens:,} tokens of the WikiText-2 test set in "
        f"windows of 128; dense {found['dense']:.1f}.",
        "",
        "| criterion | perplexity, per seed | seconds to score, the least |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--page", type=Path, default=Path("docs/importance/plans.md"))
    given = parser.parse_args(arguments)
    found = measure(given.criteria, given.seeds, given.test_tokens)
    write_whole(given.page, page(found, given.seeds, given.test_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
