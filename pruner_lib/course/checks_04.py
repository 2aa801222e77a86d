"""Checks of the exercises in notebook 04."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from pruner_lib.course.checking import passed, require, require_equal


def check_merged_weight(merged_weight: Callable[..., Tensor]) -> None:
    """Exercise 4.2: the merged layer computes what the layer and the adapter beside it compute."""
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(size, generator=generator) for size in ((5, 4), (2, 4), (5, 2)))
    alpha, rank = 16, 2
    kept = weight.clone()
    found = merged_weight(weight, down, up, alpha, rank)
    require(torch.equal(weight, kept), "The given weight was changed; return a new one.")
    require_equal(
        found,
        weight + alpha / rank * up @ down,
        asked="merged_weight(W, A, B, 16, 2)",
        mistakes={
            "The update is scaled by α / r, not by α.": weight + alpha * up @ down,
            "The update is not scaled; multiply it by α / r.": weight + up @ down,
            "That is the update; add it to W.": alpha / rank * up @ down,
            "The scale is upside down.": weight + rank / alpha * up @ down,
        },
        hint="W is [5, 4], A is [2, 4], B is [5, 2]: only one product of A and B has the shape of W.",
    )
    passed("4.2", "an ordinary layer again, no larger and no slower.")


def check_training_row(training_row: Callable[..., tuple[Sequence[int], Sequence[int]]]) -> None:
    """Exercise 4.1, on token numbers that tell prompt, response and end apart."""
    for prompt, response in (([11, 12, 13], [21, 22]), ([11], [21, 22, 23])):
        found = training_row(list(prompt), list(response), 2)
        require(
            isinstance(found, tuple | list) and len(found) == 2,
            f"training_row must return two lists, tokens and labels; it returned {found!r}.",
        )
        asked = f"training_row({prompt}, {response}, 2)"
        ids, masked = [*prompt, *response, 2], [-100] * len(prompt)
        require_equal(
            list(found[0]),
            ids,
            asked=f"{asked}, tokens",
            mistakes={"Without the end token the model never learns to stop.": ids[:-1]},
            hint="Prompt, response, end token.",
        )
        require_equal(
            list(found[1]),
            [*masked, *response, 2],
            asked=f"{asked}, labels",
            mistakes={
                "The prompt is to be read, not to be learnt: its labels are -100.": ids,
                "The end token is to be learnt as well.": [*masked, *response, -100],
                "Labels stand at the place of their own token; the loss shifts them by one itself.": [
                    *masked[1:], *response, 2, -100
                ],
                "As many labels as tokens, -100 where nothing is to be predicted.": [*response, 2],
            },
            hint="-100 for each token of the prompt, then the tokens themselves.",
        )  # fmt: skip
    passed("4.1", "what the paper's recovery learns from, and what it only reads.")


def check_distillation_loss(distillation_loss: Callable[..., Tensor]) -> None:
    """Exercise 4.3, against the definition, and at a student that is its own teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, generator=generator) for _ in range(2))
    heat = 2.0

    def divergence(first: Tensor, second: Tensor, temperature: float) -> Tensor:
        p, q = (log_softmax(logits / temperature, dim=-1) for logits in (first, second))
        return (p.exp() * (p - q)).sum(-1)

    right = divergence(teacher, student, heat)
    require_equal(
        distillation_loss(student.clone(), teacher.clone(), heat),
        heat**2 * right.mean(),
        asked="distillation_loss(student, teacher, 2.0)",
        mistakes={
            "T² is missing; without it the gradient shrinks as T grows.": right.mean(),
            "The divergence goes from the student to the teacher; the teacher's probabilities weigh.": (
                heat**2 * divergence(student, teacher, heat).mean()
            ),
            "Both sets of logits are divided by T before the softmax.": heat**2
            * divergence(teacher, student, 1.0).mean(),
            "One divergence per token, then their mean, not their sum.": heat**2 * right.sum(),
            "The sum goes over the vocabulary, the mean over the tokens.": heat**2 * right.mean() / 6,
        },
        hint="KL(p‖q) = Σ p · (log p − log q), p the teacher's at temperature T, q the student's.",
    )
    require_equal(
        distillation_loss(teacher.clone(), teacher.clone(), 1.0) + 1.0,
        1.0,
        asked="1 + distillation_loss(teacher, teacher, 1.0)",
        hint="A student that says what the teacher says has nothing to learn.",
    )
    passed("4.3", "zero where the student agrees, and it counts every token's whole distribution.")
