"""Checks of the exercises in notebook 02."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pruner_lib.course.checking import passed, require_equal
from pruner_lib.importance.grading import overlap_of_lowest


def check_kv_head_scores(kv_head_scores: Callable[[Tensor, int, int], Tensor]) -> None:
    """Exercise 2.1, on scores that tell every channel from every other."""
    for heads, kv_heads in ((4, 2), (9, 3), (8, 8)):
        scores = torch.arange(1.0, 2 * heads + 1) ** 2
        by_head = scores.view(heads, -1).sum(1)
        require_equal(
            kv_head_scores(scores.clone(), heads, kv_heads),
            by_head.view(kv_heads, -1).sum(1),
            asked=f"kv_head_scores(torch.arange(1.0, {2 * heads + 1}) ** 2, {heads}, {kv_heads})",
            mistakes={
                "Query heads on one KV head are neighbours; here every "
                f"{kv_heads}-th was added (LLM-Pruner's mistake).": by_head.view(-1, kv_heads).sum(0),
                "That is one score per query head; add those on the same KV head.": by_head,
                "A head's score is the sum over its channels, not their mean.": scores.view(
                    kv_heads, -1
                ).mean(1),
            },
            hint="Split the channels into heads and the heads into KV groups, in this order, then add.",
        )
    passed("2.1", "the fold that LLM-Pruner gets wrong.")


def check_mixed_order(mixed_order: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 2.2, on two weights and three sequences."""
    weight = torch.tensor([0.5, -2.0, 3.0, 0.0])
    gradients = torch.tensor([[0.3, 0.4, -0.5, 1.0], [0.1, -0.6, 0.2, 2.0], [-0.4, 0.5, 0.9, 3.0]])
    g, h = gradients.mean(0), (gradients**2).mean(0)
    first, second = weight * g, 0.5 * weight**2 * h
    require_equal(
        mixed_order(weight.clone(), gradients.clone()),
        (first - second).abs(),
        asked="mixed_order(weight, gradients)",
        mistakes={
            "The half before the second order is missing.": (first - 2 * second).abs(),
            "h is the mean of the squares, not the square of the mean.": (
                first - 0.5 * weight**2 * g**2
            ).abs(),
            "The second order is subtracted: the expansion steps from w to 0.": (first + second).abs(),
            "The sign is kept; a score is the size of the change.": first - second,
            "That is the first order alone.": first.abs(),
            "h is a mean over the sequences, not a sum.": (first - 3 * second).abs(),
        },
        hint=f"weight is {weight.tolist()}, gradients is {gradients.tolist()}.",
    )
    passed("2.2", "mixed order; in a real model its second term is tiny, as the next cells show.")


def check_overlap(overlap: Callable[[Tensor, Tensor, float], float]) -> None:
    """Exercise 2.3, against the library's grade."""
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    order = [10, 0, 11, 1, 2, 3, 12, 4, 5, 13, 6, 7, 8, 9, *range(14, 20)]
    scores, truth = torch.arange(20.0)[shuffle], torch.tensor(order).argsort().float()[shuffle]
    for ratio in (0.25, 0.4):
        count = round(ratio * 20)
        expected = overlap_of_lowest(scores, truth, ratio)
        by_size = overlap_of_lowest(-scores, -truth, ratio)
        require_equal(
            overlap(scores.clone(), truth.clone(), ratio),
            expected,
            asked=f"overlap(scores, truth, {ratio})",
            mistakes={
                "That is a number of groups; divide it by how many are lowest.": expected * count,
                "Divide by how many are lowest, not by all groups.": expected * count / 20,
                "Those are the highest groups; the lowest are the ones that go.": by_size,
                "Indices were compared place by place; which groups they are counts, not their order.": float(
                    (scores.argsort()[:count] == truth.argsort()[:count]).double().mean()
                ),
            },
            hint="Two sets of group numbers, the lowest by each of the two: how many are in both?",
        )
    passed("2.3", "by chance it would be the ratio itself.")
