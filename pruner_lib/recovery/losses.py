"""The loss of a batch and its gradient, a few tokens of the vocabulary-wide logits at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a label that takes no part in the loss
# Logits widened to float32 at once: on a CPU what its cache holds, elsewhere few enough to be no burden.
_CPU_LOGITS = 1 << 21
_GPU_LOGITS = 1 << 24


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's whole distribution at n tokens: logits ``[n, V]``, already divided by T."""

    logits: Tensor


@dataclass(frozen=True)
class TopTargets:
    """A teacher's k likeliest tokens at n tokens: ids and log-probabilities at T, both ``[n, k]``.

    The probability that is left, 1 − Σ p, belongs to all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor


class SoftTargets(Protocol):
    """Gives the teacher's distribution at the flat token positions ``index`` of a batch."""

    def __call__(self, index: Tensor) -> DenseTargets | TopTargets: ...


@dataclass(frozen=True)
class TokenLosses:
    """Sums over the predicted tokens of a batch.

    Attributes:
        total: (1 − weight) · cross-entropy + weight · T² · divergence; carries the gradient.
        cross_entropy: Σ −log p(token), in nats.
        divergence: Σ KL(teacher ‖ student) at temperature T, in nats; 0 without a teacher.
        count: predicted tokens.
    """

    total: Tensor
    cross_entropy: float
    divergence: float
    count: int


def token_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    soft: SoftTargets | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
) -> TokenLosses:
    r"""Next-token cross-entropy, mixed with the divergence from a teacher, summed over a batch.

    With s the student's logits at one token, y the token that follows, q = softmax s, and p, q_T the
    distributions of teacher and student at temperature T:

        loss = (1 − w) · (−log q_y) + w · T² · Σ_v p_v log(p_v / q_T,v)
        ∂loss / ∂s = (1 − w) · (q − 1_y) + w · T · (q_T − p)

    The gradient is written down here, chunk by chunk, in the pass that computes the loss: beside the
    logits and their gradient only a few tokens × V numbers are ever held in float32.

    Args:
        logits: ``[B, L, V]``, of any floating type.
        labels: ``[B, L]``, −100 where a token is not to be predicted; position t + 1 is predicted at t.
        soft: the teacher; None for cross-entropy alone.
        weight: w in [0, 1]; not read without a teacher.
        temperature: T.

    Returns:
        The sums; ``total`` may be sent backward.
    """
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    following = following.flatten().to(logits.device)
    index = (following != IGNORED).nonzero().flatten()
    mix = 0.0 if soft is None else weight
    total, parts = _TokenLoss.apply(logits, index, following[index], soft, mix, temperature)
    cross_entropy, divergence = parts.tolist()
    return TokenLosses(total, cross_entropy, divergence, len(index))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        index: Tensor,
        targets: Tensor,
        soft: SoftTargets | None,
        weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        flat = logits.detach().flatten(0, 1)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(2, dtype=wide, device=logits.device)
        step = max(1, (_CPU_LOGITS if logits.device.type == "cpu" else _GPU_LOGITS) // flat.shape[1])
        for start in range(0, len(index), step):
            rows = index[start : start + step]
            student = flat[rows].to(wide)
            slope = torch.zeros_like(student) if gradient is not None else None
            sums[0] += _cross_entropy(student, targets[start : start + step], 1 - weight, slope)
            if soft is not None and weight > 0:
                sums[1] += _divergence(student / temperature, soft(rows), weight * temperature, slope)
            if gradient is not None and slope is not None:
                gradient[rows] = slope.to(gradient.dtype)
        ctx.gradient, ctx.shape = gradient, logits.shape
        total = (1 - weight) * sums[0] + weight * temperature**2 * sums[1]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient = None if ctx.gradient is None else ctx.gradient.mul_(upstream[0]).view(ctx.shape)
        ctx.gradient = None
        return gradient, None, None, None, None, None


def _cross_entropy(student: Tensor, targets: Tensor, scale: float, slope: Tensor | None) -> Tensor:
    """Σ −log q_y; adds scale · (q − 1_y) to the slope."""
    log_q = functional.log_softmax(student, dim=-1)
    picked = log_q.gather(1, targets[:, None])
    if slope is not None and scale > 0:
        slope.add_(log_q.exp_(), alpha=scale)
        slope.scatter_add_(1, targets[:, None], torch.full_like(picked, -scale))
    return -picked.sum()


def _divergence(
    student: Tensor, teacher: DenseTargets | TopTargets, scale: float, slope: Tensor | None
) -> Tensor:
    """Σ KL(p ‖ q) at logits already divided by T; adds scale · (q − p) to the slope.

    Of a teacher known by its k likeliest tokens, the others count as one outcome: q − p becomes
    q_v (1 − p_rest / q_rest) at each of them. With k = V it is the whole divergence.
    """
    log_q = functional.log_softmax(student, dim=-1)
    if isinstance(teacher, DenseTargets):
        log_p = functional.log_softmax(teacher.logits.to(log_q), dim=-1)
        p = log_p.exp()
        value = (p * log_p.sub_(log_q)).sum()
        if slope is not None:
            slope.add_(log_q.exp_().sub_(p), alpha=scale)
        return value
    ids, log_p = teacher.ids.to(log_q.device), teacher.log_probs.to(log_q)
    p, log_top = log_p.exp(), log_q.gather(1, ids)
    smallest = torch.finfo(log_q.dtype).tiny
    p_rest = (1 - p.sum(1)).clamp_min(0)
    q_rest = (1 - log_top.exp().sum(1)).clamp_min(torch.finfo(log_q.dtype).eps)
    rest = p_rest * (p_rest.clamp_min(smallest).log() - q_rest.log())
    value = (p * (log_p - log_top)).sum() + rest.sum()
    if slope is not None:
        q = log_q.exp_()
        residual = q * (1 - p_rest / q_rest)[:, None]
        residual.scatter_(1, ids, q.gather(1, ids) - p)
        slope.add_(residual, alpha=scale)
    return value
