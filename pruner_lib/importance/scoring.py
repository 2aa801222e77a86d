"""From one parameter and what is known of it to scores of its elements and of its indices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruner_lib.importance.criteria import GRADIENTS, Criterion
from pruner_lib.importance.ends import RowGradient

_CHUNK = 1 << 19  # elements scored at a time: never a matrix as large as the parameter, and cache-sized

Known = Mapping[str, Tensor | RowGradient]
ByDim = dict[int, Tensor]


@dataclass(frozen=True)
class InputUse:
    """What one use of a parameter read.

    Attributes:
        dim: the dimension of the parameter that runs over its inputs.
        values: any of r, m, v to a vector of that dimension's size; of a stack of experts, a row of such
            numbers per expert ``[experts, size]``.
    """

    dim: int
    values: Mapping[str, Tensor]


def constant_input(weight: Tensor) -> InputUse:
    """The input of a vector: the constant 1, whose variance is 0."""
    one = torch.ones(weight.shape[0], dtype=torch.float64)
    return InputUse(0, {"r": one, "m": one, "v": torch.zeros_like(one)})


def index_scores(
    criterion: Criterion,
    weight: Tensor,
    known: Known,
    uses: Iterable[InputUse] = (),
    dims: Iterable[int] | None = None,
) -> ByDim:
    """Score of every index of some dimensions of one parameter.

    Args:
        criterion: not one that draws.
        weight: W, any shape; computed in float32 or, if it is float64, in float64.
        known: g and h, of the same shape, as far as the criterion reads them; only runs of their rows are
            asked for.
        uses: what the parameter's uses read; their scores are added up.
        dims: which dimensions; all if None.

    Returns:
        Dimension to a vector ``[weight.shape[dim]]``, float64, on the CPU. A channel score has only
        the dimensions that read an input.
    """
    wanted = range(weight.ndim) if dims is None else sorted(set(dims))
    if criterion.scope == "channel":
        return _channel_scores(criterion, weight, uses, wanted)
    found: dict[int, list[Tensor]] = {dim: [] for dim in wanted}
    for scores in _chunks(criterion, weight, known, list(uses)):
        for dim in wanted:
            others = [other for other in range(weight.ndim) if other != dim]
            found[dim].append((scores.sum(others) if others else scores).double().cpu())
    sums = {dim: torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0) for dim, parts in found.items()}
    return {dim: vector.abs() for dim, vector in sums.items()} if criterion.scope == "vector" else sums


def element_matrix(
    criterion: Criterion, weight: Tensor, known: Known, uses: Iterable[InputUse] = ()
) -> Tensor:
    """Score of every element of one parameter, in float32 or better, on the CPU.

    Raises:
        ValueError: a channel criterion, which has no score of an element.
    """
    if criterion.scope == "channel":
        raise ValueError(f"{criterion.name} scores channels, not elements; ask for vector_scores instead")
    return torch.cat([scores.cpu() for scores in _chunks(criterion, weight, known, list(uses))])


def _chunks(criterion: Criterion, weight: Tensor, known: Known, uses: list[InputUse]) -> Iterator[Tensor]:
    """Scores of runs of rows, one after the other."""
    assert criterion.score is not None
    runs = uses if criterion.needs_inputs else [InputUse(0, {})]
    rows = max(1, _CHUNK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], rows):
        here = slice(start, start + rows)
        total = None
        for use in runs:
            scores = criterion.score(**_operands(criterion, weight, known, use, here))
            total = scores if total is None else total + scores
        yield torch.zeros_like(weight[here], dtype=_wide(weight)) if total is None else total


def _operands(
    criterion: Criterion, weight: Tensor, known: Known, use: InputUse, rows: slice
) -> dict[str, Tensor]:
    """What the criterion reads, for a run of rows, in float32 or better."""
    found = {}
    for name in criterion.reads:
        if name == "W" or name in GRADIENTS:
            operand = weight if name == "W" else known[name]
            found[name] = operand[rows].detach().to(weight.device, _wide(weight))
        else:
            vector = use.values[name].to(weight.device, _wide(weight))
            shape = [1] * weight.ndim
            shape[use.dim] = vector.shape[-1]
            shape[0] = len(vector) if vector.ndim == 2 else shape[0]
            found[name] = vector.view(shape).expand(weight.shape)[rows]
    return found


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _channel_scores(
    criterion: Criterion, weight: Tensor, uses: Iterable[InputUse], dims: Iterable[int]
) -> ByDim:
    assert criterion.score is not None
    found: ByDim = {}
    for use in uses:
        if weight.ndim > 1 and use.dim in dims:
            score = criterion.score(**{name: use.values[name].double() for name in criterion.reads}).cpu()
            score = score.mean(0) if score.ndim == 2 else score  # over the experts
            found[use.dim] = found[use.dim] + score if use.dim in found else score
    return found
