"""Checks of the exercises in notebook 07."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.course.checking import passed, require_equal
from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.pruning import plan_pruning
from pruner_lib.pruning.costs import Cost

_BILLION = 10**9


def check_training_bytes(training_bytes: Callable[[int, int], int]) -> None:
    """Exercise 7.1: nothing, some and everything trained."""
    for params, trained in ((7 * _BILLION, 0), (7 * _BILLION, 20 * 10**6), (3 * _BILLION, 3 * _BILLION)):
        require_equal(
            training_bytes(params, trained),
            2 * (params - trained) + 16 * trained,
            asked=f"training_bytes({params:,}, {trained:,})",
            mistakes={
                "A trained parameter is counted twice: it is not kept in half precision as well.": 2 * params
                + 16 * trained,
                "AdamW keeps two moments of 4 bytes each.": 2 * (params - trained) + 12 * trained,
                "The trained weights themselves take 4 bytes, too.": 2 * (params - trained) + 12 * trained,
                "Only what is trained has a gradient and moments.": 16 * params,
                "Frozen parameters stay in memory.": 16 * trained,
            },
            hint="2 bytes for each frozen parameter; 4 + 4 + 8 for each trained one.",
            tolerance=1e-9,
        )
    passed("7.1", "full training of 7B needs 112 GB before the first activation, LoRA 14.")


def check_tokens_per_second(tokens_per_second: Callable[[Cost, float, int, int], float]) -> None:
    """Exercise 7.2: LLaMA-7B's cost at several batch sizes and lengths."""
    cost = Cost(
        params=6_738_415_616, macs=0, weight_bytes=13_476_831_232, kv_cache_bytes_per_token=524_288,
        batch_size=1, seq_len=64,
    )  # fmt: skip
    weights, each = cost.weight_bytes, cost.kv_cache_bytes_per_token or 0
    for context, batch in ((0, 1), (2048, 1), (2048, 16)):
        speed = 1e12
        require_equal(
            tokens_per_second(cost, speed, context, batch),
            batch * speed / (weights + batch * context * each),
            asked=f"tokens_per_second(LLaMA-7B, 1e12, {context}, {batch})",
            mistakes={
                "Every sequence has a cache of its own.": batch * speed / (weights + context * each),
                "One step writes a token for each sequence of the batch.": speed
                / (weights + batch * context * each),
                "The weights are read once for the whole batch.": speed / (weights + context * each),
                "The cache is read as well, all of it, for every token.": batch * speed / weights,
                "The cache holds context tokens for each sequence.": batch * speed / (weights + batch * each),
            },
            hint="Tokens of one step over the seconds that the step's reading takes.",
        )
    passed("7.2", "pruning speeds up writing by the bytes it saves, and a batch by sharing the weights.")


def _small_map() -> tuple[DependencyMap, dict[str, torch.Tensor]]:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    dependencies = discover(model)
    return dependencies, {family.name: torch.arange(family.size) for family in dependencies.families}


def check_smallest_ratio(smallest_ratio: Callable[[DependencyMap, Any, int], float | None]) -> None:
    """Exercise 7.3: limits between the sizes that the ratios leave, and one that nothing meets."""
    dependencies, scores = _small_map()
    costs = [plan_pruning(dependencies, scores, ratio=step / 20).cost() for step in range(20)]
    sizes = [cost.weight_bytes for cost in costs]
    for limit in (sizes[0], sizes[0] - 1, sizes[7], (sizes[11] + sizes[12]) // 2, 1):
        expected = next((step / 20 for step, size in enumerate(sizes) if size <= limit), None)
        fitting = [step / 20 for step, size in enumerate(sizes) if size <= limit]
        in_params = next((step / 20 for step, cost in enumerate(costs) if cost.params <= limit), None)
        below = next((step / 20 for step, size in enumerate(sizes) if size < limit), None)
        mistakes: dict[str, Any] = {
            "That is the largest ratio; remove as little as possible.": fitting[-1] if fitting else 0.95,
            "The limit is in bytes; parameters of half precision take two each.": in_params,
            "A model of exactly the limit fits.": below,
        }
        require_equal(
            smallest_ratio(dependencies, scores, limit),
            expected,
            asked=f"smallest_ratio(dependencies, scores, {limit:,}), where ratio 0 leaves {sizes[0]:,} bytes",
            mistakes=mistakes,
            hint="The first ratio from below whose plan.cost().weight_bytes is at most the limit.",
        )
    passed("7.3", "plans are cheap enough to try them all.")
