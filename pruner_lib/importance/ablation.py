"""Ground truth: how much the loss really changes when a group is zeroed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.importance.calibration import check_batches, mean_loss, micro_batches, untouched
from pruner_lib.importance.scores import ImportanceScores

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap


def measure_importance(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor,
    family: str | GroupFamily,
    *,
    micro_batch_size: int | None = None,
    source: str | None = None,
) -> ImportanceScores:
    """The loss change when each group of a family is zeroed in turn: what every criterion estimates.

    score_i = L(group i zeroed) - L(dense), L the mean next-token cross-entropy in nats. Negative
    means that the model is better off without the group. One forward pass per group. The weights
    are zeroed in place and put back bit for bit, also after an exception.

    Args:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]``.
        family: the family to measure, or its name.
        micro_batch_size: sequences run at once; None for all.
        source: what the text was, recorded with the scores.

    Returns:
        Scores of this one family, criterion ``"loss_change"``.

    Raises:
        UnknownFamilyError: a family that is not in ``dependencies``.
        ValueError: unusable batches.
        FloatingPointError: a loss that is NaN or infinite.
    """
    found = dependencies.family(family.name if isinstance(family, GroupFamily) else family)
    pieces = micro_batches(check_batches(model, batches), micro_batch_size)
    changes = torch.zeros(found.size, dtype=torch.float64)
    with untouched(model):
        dense = mean_loss(model, pieces)
        for group in range(found.size):
            if found.normed_by:  # the norm must average over what remains; the oracle's copy knows how
                copy = dependencies.zero(model, {found.name: [group]}).eval()
                changes[group] = mean_loss(copy, pieces) - dense
            else:
                with zeroed_in_place(model, found, group):
                    changes[group] = mean_loss(model, pieces) - dense
    return ImportanceScores(
        scores={found.name: changes},
        criterion="loss_change",
        source=source,
        num_samples=len(batches),
        seq_len=batches.shape[1],
    )


@contextmanager
def zeroed_in_place(model: nn.Module, family: GroupFamily, group: int) -> Iterator[None]:
    """Zero one group's slices in the model itself and put them back, bit for bit, on the way out."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for piece in family.slices:
                tensor = tensors[piece.parameter]
                index = torch.from_numpy(piece.of([group])).to(tensor.device)
                saved.append((tensor, piece.dim, index, tensor.index_select(piece.dim, index)))
                tensor.index_fill_(piece.dim, index, 0)
            yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)
