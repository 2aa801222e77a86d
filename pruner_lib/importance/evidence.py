"""Everything a criterion reads, collected for a set of parameters and turned into scores at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from pruner_lib.importance.calibration import (
    check_batches,
    check_finite,
    default_size,
    logits_of,
    memory_advice,
    micro_batches,
    progress_bar,
    token_losses,
    untouched,
)
from pruner_lib.importance.criteria import GRADIENTS, INPUTS, Criterion
from pruner_lib.importance.gradients import ACCUMULATE, Fold, Passes, gradient_passes
from pruner_lib.importance.inputs import InputWatch
from pruner_lib.importance.parallel import Share
from pruner_lib.importance.scoring import InputUse, Known

Score = TypeVar("Score")
Scorer = Callable[[str, nn.Parameter, Known, list[InputUse]], Score]


@dataclass(frozen=True)
class PassOptions:
    """How passes over the calibration batches run; none of it changes a score beyond rounding.

    Attributes:
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        accumulate: what is held between micro-batches; see :mod:`pruner_lib.importance.gradients`.
        progress: whether a bar is shown; None shows it in a terminal.
        advice: what else the caller's arguments can do when memory runs out; see ``memory_advice``.

    Raises:
        ValueError: a size below 1, or another word.
    """

    micro_batch_size: int | None = None
    accumulate: str = "auto"
    progress: bool | None = None
    advice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        micro_batches(torch.empty(0), self.micro_batch_size)
        if self.accumulate not in ACCUMULATE:
            raise ValueError(f"unknown accumulate {self.accumulate!r}; valid are {', '.join(ACCUMULATE)}")

    def pieces(self, batches: Tensor, size: int | None = None) -> list[Tensor]:
        """Micro-batches of ``size``, or of the size asked for."""
        return micro_batches(batches, size or self.micro_batch_size or default_size(batches))


def score_parameters(
    model: nn.Module,
    names: Iterable[str],
    batches: Tensor | None,
    criterion: Criterion,
    scorer: Scorer[Score],
    options: PassOptions,
) -> dict[str, Score]:
    """Run the passes that the criterion needs, and score each parameter as soon as all is known of it.

    Args:
        model: a causal language model; it comes back as it was.
        names: parameters to score.
        batches: token ids ``[N, L]``, all of them on every process; None if the criterion needs none.
        criterion: not one that draws.
        scorer: called once per parameter with its name, the parameter, g and h, and its inputs.
        options: how the passes run.

    Returns:
        What ``scorer`` returned, by name.

    Raises:
        ValueError: unusable batches, fewer sequences than processes, gradients that are all zero.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.
    """
    named = {name: model.get_parameter(name) for name in names}
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    if len(first) < len(named):  # tied: one parameter by several names is scored once
        scored = score_parameters(model, list(first.values()), batches, criterion, scorer, options)
        return {name: scored[first[id(parameter)]] for name, parameter in named.items()}
    parameters = named
    if not criterion.needs_batches:
        return {name: scorer(name, parameter, {}, []) for name, parameter in parameters.items()}
    batches, share = check_batches(model, batches), Share.current()
    if len(batches) < share.world:
        raise ValueError(f"{len(batches)} sequences cannot be shared by {share.world} processes; give more")
    with memory_advice(batches, *options.advice):
        uses = _inputs(model, parameters, batches, criterion, options) if criterion.needs_inputs else {}
        if not any(name in GRADIENTS for name in criterion.reads):
            return {name: scorer(name, parameter, {}, uses[name]) for name, parameter in parameters.items()}
        found: dict[str, Score] = {}
        any_gradient = False

        def score(name: str, known: Known) -> None:
            nonlocal any_gradient
            any_gradient = any_gradient or any(bool(tensor.any()) for tensor in known.values())
            found[name] = scorer(name, parameters[name], known, uses.get(name, []))

        size = 1 if criterion.needs_second_moment else None  # second moments are per sequence
        pieces = options.pieces(share.rows(batches), size)
        bar = progress_bar(len(pieces), criterion.name, options.progress)
        with untouched(model, parameters) as wanted, bar:
            reads = tuple(name for name in GRADIENTS if name in criterion.reads)
            fold = Fold(reads, wanted, score, share)
            gradient_passes(Passes(model, pieces, len(batches), bar), fold, options.accumulate)
    if not any_gradient:
        raise ValueError(
            "every gradient is zero, so no group can be told from another; check that the model's loss "
            "depends on its weights (all parameters zero? a single-token vocabulary?)"
        )
    return {name: found[name] for name in parameters}


def _inputs(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Tensor,
    criterion: Criterion,
    options: PassOptions,
) -> dict[str, list[InputUse]]:
    """r, m and v of every parameter, from forward passes alone."""
    share = Share.current()
    pieces = options.pieces(share.rows(batches))
    matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
    watch = InputWatch(matrices, [name for name in INPUTS if name in criterion.reads])
    # Without the head nothing needs the logits of every token, a fifth of the work in a small model.
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    reads_head = head is None or id(head) in watch.names
    bar, start = progress_bar(len(pieces), criterion.name, options.progress), 0
    with untouched(model), bar, share.together(), torch.no_grad():
        for piece in pieces:
            with watch:
                logits = logits_of(model, piece, last=not reads_head)
            if not bool(torch.isfinite(logits).all()):
                check_finite(model, piece, token_losses(model, piece), start, share)
            start += len(piece)
            bar.update()
        if not watch.is_finite():  # of a token that no later one looks at, the last logits know nothing
            for number, piece in enumerate(pieces):
                done = sum(map(len, pieces[:number]))
                check_finite(model, piece, token_losses(model, piece), done, share)
    return watch.finish(parameters, share, sum(piece.numel() for piece in pieces))
