"""From the measured cost of some sets of a family's groups to a score for each group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MEASURED_ONE_BY_ONE = 8
ROUNDING = 1e-6  # nats: what float32 does to a loss; a smaller cost is none

Costs = Callable[[list[list[int]]], Tensor]
"""Sets of groups to what each costs on each sequence, ``[sets, N]`` in nats."""


def scores_in_nats(
    values: Tensor, ratios: Sequence[float], growth: float, costs: Costs, most: int | None = None
) -> Tensor:
    """A family's scores ``[n]`` in nats; see ``scale_to_loss``. ``most`` (1 or more) may go together."""
    most = len(values) if most is None else most
    if len(values) <= MEASURED_ONE_BY_ONE:
        return _few(len(values), min(most, len(values) - 1) if len(ratios) > 1 else 1, costs)
    ordered, order = values.double().sort(stable=True)
    if float(ordered[-1]) == 0:  # every score is zero, which is zero in any unit
        return values.double()
    sizes = sorted({min(_size(values, ratio), most) for ratio in ratios})
    measured = _level(costs([order[:size].tolist() for size in sizes]))
    while float(measured[-1]) < ROUNDING and sizes[-1] < most:
        # Neurons that never fire, whatever they score, say nothing of those that do: measure more.
        sizes.append(min(2 * sizes[-1], most))
        measured = torch.cat([measured, _level(costs([order[: sizes[-1]].tolist()]))])
    total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    if float(total[sizes[-1]]) == 0:  # scores that do not say how the measured groups share the cost
        total = torch.arange(len(total), dtype=total.dtype)
    if len(ratios) == 1:
        sizes, measured = sizes[-1:], measured[-1:]
        curve = float(measured[0]) * (total / total[sizes[0]]) ** growth
    else:
        told = total[sizes] > 0  # zeros alone are no point of the curve
        curve = _convex(total, total[sizes][told], measured[told], growth)
    return torch.empty_like(ordered).scatter_(0, order, curve.diff())


def how_many_sets(size: int, ratios: Sequence[float]) -> int:
    """Of a family of this many groups, at most; for the progress bar."""
    if size > MEASURED_ONE_BY_ONE:
        return len(ratios)
    return size + (max(0, size - 2) if len(ratios) > 1 else 0)


def _few(size: int, together: int, costs: Costs) -> Tensor:
    """Each group measured by itself, and the lowest two and more ``together``."""
    alone = _level(costs([[group] for group in range(size)]))
    if together < 2:
        return alone
    ordered, order = alone.sort(stable=True)
    several = _level(costs([order[:count].tolist() for count in range(2, together + 1)]))
    places = torch.arange(together + 1, dtype=torch.float64)
    steps = _hull(places, torch.cat([alone.new_zeros(1), ordered[:1], several])).diff()
    rest = torch.maximum(ordered[together:], steps[-1])
    return torch.empty_like(alone).scatter_(0, order, torch.cat([steps, rest]))


def _size(values: Tensor, ratio: float) -> int:
    """How many of the lowest groups a ratio means; where all of them would be zeros, of those above zero."""
    count, zeros = max(1, round(ratio * len(values))), int((values == 0).sum())
    if count <= zeros < len(values):  # their sum is no measure; go on to groups that say something
        count = zeros + max(1, round(ratio * (len(values) - zeros)))
    return count


def _level(changes: Tensor) -> Tensor:
    """Of changes ``[sets, N]``: the mean, or its standard error where that is larger, never zero."""
    error = changes.std(1) / changes.shape[1] ** 0.5
    return changes.mean(1).maximum(error).clamp(min=torch.finfo(torch.float64).tiny)


def _convex(total: Tensor, at: Tensor, measured: Tensor, growth: float) -> Tensor:
    """Costs at all sums ``total`` from those at some: straight pieces, and steeper beyond the last."""
    points = torch.cat([at.new_zeros(1), at])
    costs = _hull(points, torch.cat([measured.new_zeros(1), measured]))
    slopes = costs.diff() / points.diff()
    place = (torch.searchsorted(points, total) - 1).clamp(0, len(slopes) - 1)
    inside = costs[place] + slopes[place] * (total - points[place])
    beyond = costs[-1] + growth * slopes[-1] * (total - points[-1])
    return torch.where(total > points[-1], beyond, inside)


def _hull(x: Tensor, y: Tensor) -> Tensor:
    """The largest convex curve below the points, at the same x: no group costs less than the one before."""
    corners: list[int] = []
    for point in range(len(x)):
        while len(corners) > 1:
            first, middle = corners[-2], corners[-1]
            chord = (y[point] - y[first]) * (x[middle] - x[first])
            if (y[middle] - y[first]) * (x[point] - x[first]) < chord:
                break
            corners.pop()
        corners.append(point)
    found = y.clone()
    for first, last in itertools.pairwise(corners):
        inner = slice(first, last + 1)
        found[inner] = y[first] + (y[last] - y[first]) * (x[inner] - x[first]) / (x[last] - x[first])
    return found
