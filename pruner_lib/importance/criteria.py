"""Criteria and reductions: one line of mathematics each, in one place.

W is a parameter, N the number of calibration sequences, L the mean token cross-entropy over all of
them, g = ∂L/∂W, g_j the gradient of sequence j alone and h = (1/N) Σ_j g_j². A criterion scores
every element of W; the score of one index of a dimension is the sum over the other dimensions.

To add one, write the line and pass it in place of a name (or add it to the table below)::

    cubic = Criterion("l3", "Σ |W|³", lambda W, g, h: W.abs() ** 3)
    estimate_importance(model, dependencies, None, criterion=cubic)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

Elementwise = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """How one weight, vector or group gets its score.

    Attributes:
        name: as given to ``estimate_importance``.
        equation: the score of one index of one parameter, in words of the module docstring.
        elementwise: (W, g, h), all of one shape, to a tensor of that shape; g and h are empty
            tensors unless needed. None: the criterion draws one random number per group.
        needs_gradient: whether it reads g.
        needs_second_moment: whether it reads h, which takes one backward pass per sequence.
        vector: whether the absolute value is taken after the sum instead of before.
    """

    name: str
    equation: str
    elementwise: Elementwise | None
    needs_gradient: bool = False
    needs_second_moment: bool = False
    vector: bool = False

    @property
    def needs_batches(self) -> bool:
        return self.needs_gradient or self.needs_second_moment


# Equations as LLM-Pruner's code has them (arXiv 2305.11627, section 3.2, and its repository).
_BUILT_IN = (
    Criterion("random", "uniform, one draw per group", None),
    Criterion("l1", "Σ |W|", lambda W, g, h: W.abs()),
    Criterion("l2", "Σ W² (no root)", lambda W, g, h: W**2),
    Criterion("taylor_vector", "|Σ W·g|", lambda W, g, h: W * g, needs_gradient=True, vector=True),
    Criterion("taylor_first", "Σ |W·g|", lambda W, g, h: (W * g).abs(), needs_gradient=True),
    Criterion("taylor_second", "Σ |W²·h|", lambda W, g, h: (W**2 * h).abs(), needs_second_moment=True),
    Criterion(
        "taylor_mixed",
        "Σ |W·g − ½ W²·h|",
        lambda W, g, h: (W * g - 0.5 * W**2 * h).abs(),
        needs_gradient=True,
        needs_second_moment=True,
    ),
)
CRITERIA = MappingProxyType({criterion.name: criterion for criterion in _BUILT_IN})

Reduction = Callable[[Tensor], Tensor]

# [slices, size] to [size]; "last" is the structure that reads the group last (o_proj, down_proj).
REDUCTIONS: MappingProxyType[str, Reduction] = MappingProxyType(
    {
        "sum": lambda slices: slices.sum(0),
        "product": lambda slices: slices.prod(0),
        "max": lambda slices: slices.amax(0),
        "last": lambda slices: slices[-1],
        "mean": lambda slices: slices.mean(0),
    }
)


def get_criterion(name: str | Criterion) -> Criterion:
    """The criterion of that name; a :class:`Criterion` is its own.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if isinstance(name, Criterion):
        return name
    if name not in CRITERIA:
        valid = ", ".join(CRITERIA)
        raise ValueError(f"unknown criterion {name!r}; valid are {valid}, or a Criterion of your own")
    return CRITERIA[name]


def get_reduction(name: str) -> Reduction:
    """The reduction of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"unknown reduction {name!r}; valid are {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]


_CHUNK = 1 << 20  # elements scored at a time, so that the score matrix is never as large as the parameter


def index_scores(
    criterion: Criterion, weight: Tensor, gradient: Tensor | None, moment: Tensor | None
) -> list[Tensor]:
    """Score of every index of every dimension of one parameter.

    Args:
        criterion: an element-wise one.
        weight: W, any shape; computed in float32 or, if it is float64, in float64.
        gradient: g of the same shape, or None if the criterion does not read it.
        moment: h of the same shape, or None if the criterion does not read it.

    Returns:
        One vector ``[weight.shape[d]]`` per dimension d, float64, on the CPU.
    """
    assert criterion.elementwise is not None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = max(1, _CHUNK // max(1, weight[0].numel())) if weight.ndim else 1
    sums: list[list[Tensor]] = [[] for _ in weight.shape]
    for start in range(0, weight.shape[0], rows):
        parts = [
            part[start : start + rows].detach().to(wide) if part is not None else weight.new_empty(0)
            for part in (weight, gradient, moment)
        ]
        scores = criterion.elementwise(parts[0], parts[1], parts[2])
        for dim in range(weight.ndim):
            others = [other for other in range(weight.ndim) if other != dim]
            sums[dim].append((scores.sum(others) if others else scores).double().cpu())
    vectors = [torch.cat(sums[0]), *(torch.stack(parts).sum(0) for parts in sums[1:])]
    return [vector.abs() for vector in vectors] if criterion.vector else vectors
