"""The granularities finer than the group: elements and vectors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor, nn

from pruner_lib.importance.criteria import Criterion, get_criterion
from pruner_lib.importance.evidence import PassOptions, score_parameters
from pruner_lib.importance.scoring import ByDim, InputUse, Known, element_matrix, index_scores


def element_scores(
    model: nn.Module,
    parameters: str | Iterable[str],
    batches: Tensor | None,
    *,
    criterion: str | Criterion = "taylor_second",
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Score of every single weight of some parameters: the finest granularity.

    Args:
        model: a causal language model; it comes back as it was.
        parameters: a name as in ``model.named_parameters()``, or several. Each score matrix is as
            large as its parameter, so name what you want to see.
        batches: token ids ``[N, L]``; None for criteria that need no text.
        criterion: any but ``random``, and ``activation``, which has no score of a weight. Of
            ``taylor_vector`` the elements are W·g with their signs.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Parameter name to a tensor of its shape, in float32 or better; two names of one tied parameter
        share theirs.

    Raises:
        ValueError: an unknown parameter or criterion, or unusable batches.
        FloatingPointError, MemoryError: as for ``estimate_importance``.
    """
    chosen = _weighing(criterion)
    options = PassOptions(micro_batch_size, progress=progress)

    def score(name: str, weight: nn.Parameter, known: Known, uses: list[InputUse]) -> Tensor:
        return element_matrix(chosen, weight, known, uses)

    return score_parameters(model, _named(model, parameters), batches, chosen, score, options)


def vector_scores(
    model: nn.Module,
    parameters: str | Iterable[str],
    batches: Tensor | None,
    *,
    criterion: str | Criterion = "taylor_second",
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Score of every row, column … of some parameters: element scores summed over the other dimensions.

    A group's slice is the sum of the vectors it holds, and its score the reduction over its slices.

    Args:
        model, parameters, batches, criterion, micro_batch_size, progress: as for :func:`element_scores`.

    Returns:
        Parameter name to dimension to a vector, one float64 score per index of that dimension.
    """
    chosen = _weighing(criterion)
    options = PassOptions(micro_batch_size, progress=progress)

    def score(name: str, weight: nn.Parameter, known: Known, uses: list[InputUse]) -> ByDim:
        return index_scores(chosen, weight, known, uses)

    return score_parameters(model, _named(model, parameters), batches, chosen, score, options)


def _weighing(criterion: str | Criterion) -> Criterion:
    chosen = get_criterion(criterion)
    if chosen.scope == "group":
        raise ValueError(f"{chosen.name} draws one number per group; it has no scores of elements or vectors")
    return chosen


def _named(model: nn.Module, parameters: str | Iterable[str]) -> list[str]:
    """The names, without doubles, checked against the model."""
    names = [parameters] if isinstance(parameters, str) else list(dict.fromkeys(parameters))
    if not names:
        raise ValueError("no parameters are named; give names as in model.named_parameters()")
    present = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        if name not in present:
            listed = ", ".join(difflib.get_close_matches(name, present, n=3) or present[:3])
            raise ValueError(f"the model has no parameter {name!r}; it has {len(present)}, such as {listed}")
    return names
