"""Checks of the exercises in notebook 05."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pruner_lib.course.checking import passed, require, require_equal
from pruner_lib.course.toys import tiny_llama
from pruner_lib.discovery import discover
from pruner_lib.evaluation import count_cost
from pruner_lib.pruning import PruningPlan, prune


def check_perplexity_of(perplexity_of: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 5.1, on random logits of two windows."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 9, generator=generator)
    ids = torch.randint(9, (2, 6), generator=generator)
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    unshifted = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    mean = float(losses.mean())
    require_equal(
        perplexity_of(logits.clone(), ids.clone()),
        math.exp(mean),
        asked="perplexity_of(logits, ids)",
        mistakes={
            "Logits at place t predict the token at t + 1, not their own token.": math.exp(
                float(unshifted.mean())
            ),
            "That is the mean loss; the perplexity is its exponential.": mean,
            "First the mean over all tokens, then the exponential: windows are not averaged after it.": float(
                losses.mean(1).exp().mean()
            ),
            "First the mean over all tokens, then the exponential, not the other way round.": float(
                losses.exp().mean()
            ),
            "Natural logarithms go with exp, not with 2 to the power.": 2**mean,
        },
        hint="ids are [windows, tokens]; the first token of a window is not predicted.",
    )
    passed("5.1", "the number that the whole course is judged by.")


def check_paired_change(paired_change: Callable[..., tuple[float, float]]) -> None:
    """Exercise 5.3, on two models that agree on most items."""
    first = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 0])
    second = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 0, 1, 1])
    number = len(first)
    change = second - first
    found = paired_change(first.clone(), second.clone())
    require(
        isinstance(found, tuple | list) and len(found) == 2,
        f"paired_change must return the change and its standard error; it returned {found!r}.",
    )
    require_equal(
        float(found[0]),
        float(change.mean()),
        asked="paired_change(first, second), the change",
        mistakes={"The sign: second minus first.": -float(change.mean())},
        hint="The mean of the differences, item by item.",
    )
    single = [float(scores.std() / math.sqrt(number)) for scores in (first, second)]
    require_equal(
        float(found[1]),
        float(change.std() / math.sqrt(number)),
        asked="paired_change(first, second), the standard error",
        mistakes={
            "That is the error if they had answered different items; take the differences first.": (
                math.hypot(*single)
            ),
            "That is the spread of one difference; the mean of n is √n times as sure.": float(change.std()),
            "Divide by √n, not by n.": float(change.std() / number),
            "With n − 1 below the sum of squares; `Tensor.std()` does so by itself.": float(
                change.std(correction=0) / math.sqrt(number)
            ),
            "That is the error of the first model alone.": single[0],
            "That is the error of the second model alone.": single[1],
        },
        hint="s / √n, with s the standard deviation of the differences.",
    )
    passed("5.3", "two models on the same items are compared item by item.")


def check_cache_bytes(cache_bytes: Callable[[Sequence[int], int, int], int]) -> None:
    """Exercise 5.2, against what the library counts on a small Llama before and after a cut."""
    model = tiny_llama(layers=3, heads=6, kv_heads=3)
    plan = PruningPlan.from_removal(discover(model), {"layers.1.attention_head": [0]})
    for heads, counted in (
        ([3, 3, 3], count_cost(model).kv_cache_bytes_per_token or 0),
        ([3, 2, 3], count_cost(prune(model, plan)).kv_cache_bytes_per_token or 0),
    ):
        require_equal(
            cache_bytes(heads, 8, 4),
            counted,
            asked=f"cache_bytes({heads}, 8, 4)",
            mistakes={
                "Keys and values are two tensors.": counted // 2,
                "Numbers were counted, not bytes.": counted // 4,
                "Layers may differ; add up the heads of each.": 2 * heads[0] * len(heads) * 8 * 4,
                "That is one layer; every layer keeps its own.": 2 * heads[0] * 8 * 4,
            },
            hint="Per token each layer keeps one key and one value of head_dim numbers for each KV head.",
            tolerance=0,
        )
    passed("5.2", "why pruning KV heads pays at long contexts.")
