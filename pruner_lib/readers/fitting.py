r"""Ridge regression of a reader on what is left of its input.

With h_t the input that token t leaves after the cut, T_t what the reader should return, w_t the weight of
the token and W the dense weights of the inputs that stay:

    W' = argmin_V  Σ_t w_t ‖V h_t − T_t‖²  +  λ c ‖V − W‖²,      c = mean of the diagonal of C
       = (B + λ c W) (C + λ c I)⁻¹,                              C = Σ w_t h_t h_tᵀ,  B = Σ w_t T_t h_tᵀ

λ = 0 is least squares, λ → ∞ leaves the cut weights as they are. With a bias all is centred first, and the
bias is the mean of what remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOKENS_PER_CHANNEL = 2  # fewer, and the fit is mostly the shrinkage


@dataclass
class Statistics:
    """Sums over tokens, in float64: all that a fit needs, whatever the number of tokens.

    Where the reader has a bias, h and T are taken from an origin, the means of the first piece: products of
    large means in float32 would round away what lies around them, and C less its mean would not be positive.
    """

    second: Tensor  # C [in, in]
    cross: Tensor  # B [out, in]
    inputs: Tensor  # Σ w h [in]
    targets: Tensor  # Σ w T [out]
    centred: bool = False
    origin: tuple[Tensor, Tensor] | None = None  # of h [in] and of T [out]
    energy: float = 0.0  # Σ w ‖T‖²
    scale: float = 0.0  # the same with T as given, not from the origin
    weight: float = 0.0  # Σ w
    tokens: int = 0

    @classmethod
    def empty(cls, inward: int, outward: int, device: torch.device, *, centred: bool = False) -> Statistics:
        """No tokens yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(inward, inward), zeros(outward, inward), zeros(inward), zeros(outward), centred)

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Take in tokens: ``[n, in]``, ``[n, out]``, ``[n]``."""
        wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        root = weights.to(wide).sqrt()[:, None]
        h, t = inputs.to(wide), targets.to(wide)
        self.scale += float((t * root).double().square().sum())
        if self.centred:
            share = (weights / weights.sum()).to(wide)
            self.origin = self.origin or (share @ h, share @ t)
            h, t = h - self.origin[0], t - self.origin[1]
        h, t = h * root, t * root
        self.second += h.T @ h
        self.cross += t.T @ h
        self.inputs += (h * root).sum(0)
        self.targets += (t * root).sum(0)
        self.energy += float(t.double().square().sum())
        self.weight += float(weights.double().sum())
        self.tokens += len(inputs)

    def of_reader(self, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Statistics:
        """For predicting what a reader returns, W h + b, from the inputs ``kept`` alone; sums of h do."""
        origin = None
        if self.origin is not None:
            wide = weight.to(self.origin[0])
            origin = (self.origin[0][kept], wide @ self.origin[0] + (0 if bias is None else bias.to(wide)))
        return Statistics(
            self.second[kept][:, kept],
            weight @ self.second[:, kept],
            self.inputs[kept],
            weight @ self.inputs,
            self.centred,
            origin,
            weight=self.weight,
            tokens=self.tokens,
        )

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of h ``[in]`` and T ``[out]``, weighted."""
        mean, centre = self.inputs / self.weight, self.targets / self.weight
        return (mean, centre) if self.origin is None else (mean + self.origin[0], centre + self.origin[1])

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Σ w ‖W h + b − T‖² over Σ w ‖T‖²."""
        if self.origin is not None:
            moved = weight @ self.origin[0].to(weight) - self.origin[1]
            bias = moved if bias is None else bias + moved
        error = self.energy + float((weight @ self.second * weight).sum() - 2 * (weight * self.cross).sum())
        if bias is not None:
            error += float(2 * bias @ (weight @ self.inputs - self.targets) + self.weight * bias @ bias)
        return error / self.scale if self.scale else 0.0

    @property
    def finite(self) -> bool:
        """Whether every sum is a number."""
        return bool(torch.isfinite(self.second).all() and torch.isfinite(self.cross).all())


@dataclass(frozen=True)
class Fit:
    """New weights of a reader and how they came about.

    Attributes:
        weight, bias: ``[out, in]`` and ``[out]`` or None.
        ridge: λ; infinite where the weights stayed as they were.
        before, after: relative squared error of its output on held-out tokens, cut and fitted again.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    ridge: float
    before: float
    after: float


def ridge_fit(
    statistics: Statistics, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """W' and b' for one λ; see the module."""
    second, cross = statistics.second, statistics.cross
    if bias is not None:
        sums, total = (statistics.inputs, statistics.targets), statistics.weight
        second = second - torch.outer(sums[0], sums[0]) / total
        cross = cross - torch.outer(sums[1], sums[0]) / total
    shrink = ridge * float(second.diagonal().mean())
    # The weights' change is solved for, so that directions without evidence stay exactly as they were.
    system = second + (shrink + 1e-9 * float(second.diagonal().mean())) * torch.eye(len(second)).to(second)
    change = torch.cholesky_solve((cross - weight @ second).T, torch.linalg.cholesky(system)).T
    fitted = weight + change
    mean, centre = statistics.means
    return fitted, None if bias is None else centre - fitted @ mean


def best_fit(
    fit: Statistics,
    held: Statistics,
    weight: Tensor,
    bias: Tensor | None,
    ridges: Sequence[float],
    start: float | None = None,
) -> Fit:
    """The fit whose λ is best on held-out tokens, or no change if none helps.

    The search walks from one λ downhill and stops where neither neighbour is better, which is the best of all
    where the error falls and then rises with λ. Each fit is a solve of the reader's width; one that has no
    solution (inputs that are zero, or too few tokens for a λ of 0) counts as no help.

    Args:
        fit, held: sums over the tokens that are fitted on, and over the others.
        weight, bias: as cut.
        ridges: the λ to choose from.
        start: where to begin, best what an alike reader chose; None begins in the middle.
    """
    before = held.error(weight, bias)
    found = Fit(weight, bias, float("inf"), before, before)
    ordered = sorted(set(ridges))
    errors = {-1: float("inf"), len(ordered): float("inf")}

    def at(place: int) -> float:
        nonlocal found
        if place not in errors:
            try:
                fitted, moved = ridge_fit(fit, weight, bias, ordered[place])
            except torch.linalg.LinAlgError:
                errors[place] = float("inf")
                return errors[place]
            errors[place] = held.error(fitted, moved)
            if errors[place] < found.after:  # only the best is held: a fit is as large as the weights
                found = Fit(fitted, moved, ordered[place], before, errors[place])
        return errors[place]

    place = ordered.index(start) if start in ordered else len(ordered) // 2
    while at(place) == float("inf") and place + 1 < len(ordered):  # more shrinkage makes it solvable
        place += 1
    while (best := min((place, place - 1, place + 1), key=at)) != place:
        place = best
    return found


def mean_fit(fit: Statistics, held: Statistics, weight: Tensor, bias: Tensor | None) -> Fit:
    r"""Only the mean of the output is put right: ``b' = b + δ``, δ = mean of T − W h − b.

    Without a bias δ goes into the weights, along the inputs that are steadily on:

        W' = W + δ uᵀ,   u_j = (m_j / d_j) / Σ_k m_k² / d_k,   m = mean of h,  d = mean of h²

    so that W' m = W m + δ with the least change Σ d_j ΔW_j². It reads the diagonal of C alone.
    """
    mean, centre = fit.means
    missing = centre - weight @ mean - (0 if bias is None else bias)
    before = held.error(weight, bias)
    if bias is not None:
        fitted, moved = weight, bias + missing
    else:
        along = mean / (fit.second.diagonal() / fit.weight).clamp(min=1e-12)
        fitted, moved = weight + torch.outer(missing, along / (along @ mean).clamp(min=1e-12)), None
    after = held.error(fitted, moved)
    if not after < before:
        return Fit(weight, bias, float("inf"), before, before)
    return Fit(fitted, moved, 0.0, before, after)


def too_few(tokens: int, thin: Mapping[str, int]) -> str:
    """One sentence on the readers (path to channels) that have too little text."""
    worst = max(thin, key=thin.__getitem__)
    others = f" and {len(thin) - 1} more readers" if len(thin) > 1 else ""
    return (
        f"{tokens:,} calibration tokens for {thin[worst]:,} channels of {worst}{others}: a fit takes at "
        f"least {TOKENS_PER_CHANNEL * thin[worst]:,}, a good one ten times as many. They stay near the old"
    )
