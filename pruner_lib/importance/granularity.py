"""The granularities besides the group: elements, vectors, and whole decoder layers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruner_lib.importance.calibration import (
    check_batches,
    check_finite,
    memory_advice,
    progress_bar,
    token_losses,
    untouched,
)
from pruner_lib.importance.chain import decoder_layers, hidden_of, place_of_hidden, record, starting_after
from pruner_lib.importance.criteria import Criterion, get_criterion
from pruner_lib.importance.evidence import PassOptions, score_parameters
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.importance.scoring import ByDim, InputUse, Known, element_matrix, index_scores

LAYER_CRITERIA = ("block_influence", "loss_change")
LAYERS = "layers"  # the one family that layer scores are of


def element_scores(
    model: nn.Module,
    parameters: str | Iterable[str],
    batches: Tensor | None,
    *,
    criterion: str | Criterion = "taylor_first",
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
        Parameter name to a tensor of its shape, in float32 or better.

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
    criterion: str | Criterion = "taylor_first",
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
    present = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        if name not in present:
            listed = ", ".join(difflib.get_close_matches(name, present, n=3) or present[:3])
            raise ValueError(f"the model has no parameter {name!r}; it has {len(present)}, such as {listed}")
    return names


def layer_importance(
    model: nn.Module,
    batches: Tensor,
    *,
    criterion: str = "block_influence",
    micro_batch_size: int | None = None,
    source: str | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> ImportanceScores:
    """Score of every decoder layer as a whole: the coarsest granularity.

    ``"block_influence"`` of layer l is 1 − mean over tokens of cos(x_l, x_{l+1}), with x_l its input and
    x_{l+1} its output: how far it turns the hidden state; between 0 and 2, one forward pass for all.
    ``"loss_change"`` is the loss without layer l minus the loss with it, in nats; each layer costs those
    after it, since what comes before is computed once.

    Args:
        model: a causal language model; it comes back as it was.
        batches: token ids ``[N, L]``.
        criterion: ``"block_influence"`` or ``"loss_change"``.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        source: what the text was, recorded with the scores.
        seed: what the batches were drawn with, recorded.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Scores of one family, ``"layers"``, one per decoder layer.

    Raises:
        ValueError: an unknown criterion, or unusable batches.
        NotAChain: a model whose layers do not simply hand one hidden state on.
        FloatingPointError, MemoryError: as for ``estimate_importance``.

    Source: ShortGPT, arXiv 2403.03853.
    """
    if criterion not in LAYER_CRITERIA:
        raise ValueError(f"unknown layer criterion {criterion!r}; valid are {', '.join(LAYER_CRITERIA)}")
    batches = check_batches(model, batches)
    pieces = PassOptions(micro_batch_size).pieces(batches)
    totals, start = torch.zeros(len(decoder_layers(model)), dtype=torch.float64), 0
    step = _turned if criterion == "block_influence" else _missed
    bar = progress_bar(len(pieces), criterion, progress)
    with untouched(model), memory_advice(batches), torch.no_grad(), bar:
        for piece in pieces:
            losses, sums = step(model, piece)
            check_finite(model, piece, losses, start)
            totals += sums
            start += len(piece)
            bar.update()
    return ImportanceScores(
        scores={LAYERS: totals / start},
        criterion=criterion,
        source=source,
        seed=seed,
        num_samples=len(batches),
        seq_len=batches.shape[1],
    )


def _turned(model: nn.Module, piece: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and per layer the sum over sequences of 1 − the mean cosine of input and output."""
    layers = decoder_layers(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def hook(layer: int) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            place = place_of_hidden(args, kwargs)
            before = args[place] if isinstance(place, int) else kwargs[place]
            after = hidden_of(output)
            wide = torch.float64 if after.dtype == torch.float64 else torch.float32
            cosine = functional.cosine_similarity(before.to(after.device, wide), after.to(wide), dim=-1)
            sums[layer] += float((1 - cosine.double().mean(1)).sum())

        return compare

    handles = [
        layer.register_forward_hook(hook(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    try:
        return token_losses(model, piece), sums
    finally:
        for handle in handles:
            handle.remove()


def _missed(model: nn.Module, piece: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and per layer the sum over sequences of the loss change without it."""
    found = record(model, piece)
    sums = torch.zeros(len(found.calls), dtype=torch.float64)
    for layer in range(len(found.calls)):
        with starting_after(found.calls, layer, found.hidden[layer]):
            sums[layer] = float((token_losses(model, piece) - found.losses).double().sum())
    return found.losses, sums
