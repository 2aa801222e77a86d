"""Checks of the exercises in notebook 08."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch
from torch import Tensor
from torch.nn import functional

from pruner_lib.course.checking import passed, require, require_equal

_LEVELS = 127


def check_distillation_loss(distillation_loss: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 8.1, against torch's own divergence at three temperatures."""
    draws = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 11, generator=draws) for _ in range(2))
    for temperature in (1.0, 2.0, 0.5):
        p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
        kl = functional.kl_div(q, p, log_target=True, reduction="batchmean")
        square = temperature**2
        require_equal(
            distillation_loss(student, teacher, temperature),
            square * kl,
            asked=f"distillation_loss(student, teacher, {temperature})",
            mistakes={
                "The two are swapped: the teacher's probabilities weigh the difference.": square
                * functional.kl_div(p, q, log_target=True, reduction="batchmean"),
                "T² is missing; it keeps the gradient's size at every temperature.": kl,
                "The mean goes over tokens; over the vocabulary it is a sum.": square
                * kl
                / student.shape[-1],
                "That is the sum over tokens.": square * kl * len(student),
                "The sign is wrong: a divergence is never negative.": -square * kl,
                "That is the cross-entropy, which the teacher's own entropy is part of.": -square
                * (p.exp() * q).sum(-1).mean(),
            },
            hint="T² times the mean over tokens of Σ p (log p − log q), both at temperature T.",
            tolerance=1e-4,
        )
    itself = distillation_loss(teacher, teacher, 2.0)
    require(abs(float(itself)) < 1e-5, f"a model's divergence from itself is 0, not {float(itself):.3g}")
    passed("8.1", "zero for the teacher itself, and never below.")


def _rounded(weights: Tensor, width: int = 32, levels: float = _LEVELS, *, down: bool = False) -> Tensor:
    blocks = weights.reshape(-1, width)
    scale = blocks.abs().amax(1, keepdim=True) / levels
    ratio = torch.where(scale > 0, blocks / scale.clamp_min(1e-30), 0.0)
    whole = ratio.trunc() if down else ratio.round()
    return (whole * scale).reshape(weights.shape)


def check_round_to_8_bits(round_to_8_bits: Callable[[Tensor], Tensor]) -> None:
    """Exercise 8.2, against the package that writes GGUF files; blocks of different size, one of zeros."""
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 64, generator=draws) * torch.tensor([[0.01], [1.0], [30.0], [0.0]])
    given = weights.clone()
    found = round_to_8_bits(weights)
    require(isinstance(found, Tensor), f"expected a tensor like the weights, got {type(found).__name__}")
    require(torch.equal(weights, given), "the given weights were changed; return a new tensor")
    require(
        bool(torch.isfinite(found).all()),
        "NaN in the result: a block of zeros has the scale 0, and nothing can be divided by it",
    )
    kind = gguf.GGMLQuantizationType.Q8_0
    truth = torch.from_numpy(gguf.dequantize(gguf.quantize(weights.numpy(), kind), kind))
    mistakes = {
        "That is one scale for all; each 32 neighbours have their own.": _rounded(weights, weights.numel()),
        "That is one scale for each row; each 32 neighbours have their own.": _rounded(weights, 64),
        "The largest value of a block becomes 127.": _rounded(weights, levels=128),
        "Those are the whole numbers; times their scale they are weights again.": _rounded(weights)
        / (weights.reshape(-1, 32).abs().amax(1, keepdim=True) / _LEVELS)
        .clamp_min(1e-30)
        .expand(-1, 32)
        .reshape(weights.shape),
        "Nothing was rounded.": weights,
        "Round to the nearest, not towards zero.": _rounded(weights, down=True),
    }
    for words, wrong in mistakes.items():
        require(
            found.shape == wrong.shape, f"expected shape {tuple(weights.shape)}, got {tuple(found.shape)}"
        )
        require(not torch.allclose(found, wrong, rtol=1e-6, atol=1e-9), words)
    # The file keeps its scales in half precision.
    require(
        torch.allclose(found, truth, rtol=2e-3, atol=1e-6),
        "expected what gguf makes of the weights: round(w / s) · s, s = max|w| / 127 of each 32 neighbours",
    )
    passed("8.2", "what the GGUF file holds, up to its scales in half precision.")


def check_tokens_per_pass(tokens_per_pass: Callable[[float, int], float]) -> None:
    """Exercise 8.3, the ends included: nothing and everything accepted."""
    for rate, drafted in ((0.5, 1), (0.5, 4), (0.8, 3), (0.0, 4), (1.0, 4)):
        powers = [rate**place for place in range(drafted + 1)]
        require_equal(
            tokens_per_pass(rate, drafted),
            sum(powers),
            asked=f"tokens_per_pass({rate}, {drafted})",
            mistakes={
                "A token after a refused one is lost, even if it was right.": 1 + rate * drafted,
                "The dense model adds one token of its own in every pass.": sum(powers) - 1,
                "That is one drafted token too few.": sum(powers[:-1]),
                "Only a draft that is right to its end was counted.": 1 + drafted * rate**drafted,
            },
            hint="1 + rate + rate² + … + rate^drafted.",
        )
    passed("8.3", "drafting further ahead helps less and less, and costs as much each time.")
