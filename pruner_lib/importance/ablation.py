"""Ground truth: how much the loss really changes when a group is zeroed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.discovery.grouping import layer_list, layer_of
from pruner_lib.discovery.zeroing import zeroed_in_place
from pruner_lib.importance.calibration import (
    check_batches,
    check_finite,
    default_size,
    mean_loss,
    memory_advice,
    micro_batches,
    progress_bar,
    token_losses,
    untouched,
)
from pruner_lib.importance.chain import NotAChain, Recording, record, starting_after
from pruner_lib.importance.estimate import check_family
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
    seed: int | None = None,
    progress: bool | None = None,
) -> ImportanceScores:
    """The loss change when each group of a family is zeroed in turn: what every criterion estimates.

    score_i = L(group i zeroed) - L(dense), L the mean next-token cross-entropy in nats. Negative
    means that the model is better off without the group. See :func:`loss_changes` for what it costs.

    Args:
        model: a causal language model; it comes back as it was, bit for bit, also after an exception.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]``.
        family: the family to measure, or its name.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        source: what the text was, recorded with the scores.
        seed: what the batches were drawn with, recorded.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Scores of this one family, criterion ``"loss_change"``.

    Raises:
        UnknownFamilyError: a family that is not in ``dependencies``.
        ValueError: unusable batches, or a family of another model.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.
    """
    found = dependencies.family(family.name if isinstance(family, GroupFamily) else family)
    changes = loss_changes(
        model, dependencies, batches, found, micro_batch_size=micro_batch_size, progress=progress
    )
    return ImportanceScores(
        scores={found.name: changes},
        criterion="loss_change",
        source=source,
        seed=seed,
        num_samples=len(batches),
        seq_len=batches.shape[1],
    )


def loss_changes(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor,
    family: str | GroupFamily,
    groups: Sequence[int] | None = None,
    *,
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> Tensor:
    """:func:`measure_importance` for some groups of a family only.

    A family that lies in one decoder layer costs, per group, that layer and those after it: what comes
    before is computed once, the layer once per group with the group zeroed, and the layers after it
    on the outputs of several groups stacked along the batch. Other families take a whole forward pass
    per group. Both give the same numbers up to rounding.

    Args:
        groups: which ones, in any order; all if None.
        model, dependencies, batches, family, micro_batch_size, progress: as for ``measure_importance``.

    Returns:
        Loss changes ``[len(groups)]`` in nats, float64.
    """
    found = dependencies.family(family.name if isinstance(family, GroupFamily) else family)
    chosen = list(range(found.size)) if groups is None else [int(group) for group in groups]
    if not chosen or not all(0 <= group < found.size for group in chosen):
        raise ValueError(f"groups of {found.name} run from 0 to {found.size - 1}; got {chosen or 'none'}")
    check_family(model, dependencies, found)
    batches = check_batches(model, batches)
    size = micro_batch_size or default_size(batches)
    pieces = micro_batches(batches, size if micro_batch_size is None else micro_batch_size)
    layer = layer_index(model, found)
    with untouched(model), memory_advice(batches), torch.no_grad():
        ablation = Ablation(
            model, dependencies, found, [[group] for group in chosen], tensors_of(model, found)
        )
        bar = progress_bar(len(pieces) * len(chosen), f"zeroing {found.name}", progress)
        with bar:
            if layer is not None:
                try:
                    return ablation.from_layer(layer, pieces, bar)
                except NotAChain:
                    bar.reset()
            return ablation.whole(pieces, bar)


def layer_index(model: nn.Module, family: GroupFamily) -> int | None:
    """The decoder layer that holds all of a family's slices; None if none does, or a norm must follow."""
    if family.normed_by:
        return None
    path, _ = layer_list(model)
    return layer_of({piece.parameter for piece in family.slices}, path)


def tensors_of(model: nn.Module, family: GroupFamily) -> dict[str, Tensor]:
    """Parameters and buffers that hold a family's slices.

    Raises:
        ValueError: the model has no such tensor.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for piece in family.slices:
        tensor = tensors.get(piece.parameter)
        if tensor is None or tensor.shape[piece.dim] <= int(piece.index.max()):
            raise ValueError(
                f"{family.name} does not belong to this model: it has no {piece.parameter} of that "
                "size. Call discover on this model"
            )
    return {piece.parameter: tensors[piece.parameter] for piece in family.slices}


@dataclass(frozen=True)
class Ablation:
    """The sets of groups to zero, each in turn, and the two ways to do it."""

    model: nn.Module
    dependencies: DependencyMap
    family: GroupFamily
    groups: Sequence[Sequence[int]]
    tensors: Mapping[str, Tensor]

    def whole(self, pieces: list[Tensor], bar: tqdm) -> Tensor:
        """One forward pass of the whole model per set."""
        dense = mean_loss(self.model, pieces)
        changes = torch.zeros(len(self.groups), dtype=torch.float64)
        for place, group in enumerate(self.groups):
            if self.family.normed_by:  # the norm must average over what remains; the oracle's copy knows how
                copy = self.dependencies.zero(self.model, {self.family.name: group}).eval()
                changes[place] = mean_loss(copy, pieces) - dense
            else:
                with zeroed_in_place(self.tensors, [(piece, group) for piece in self.family.slices]):
                    changes[place] = mean_loss(self.model, pieces) - dense
            bar.update(len(pieces))
        return changes

    def from_layer(self, layer: int, pieces: list[Tensor], bar: tqdm) -> Tensor:
        """From the family's layer on, several sets at once."""
        totals = torch.zeros(len(self.groups), dtype=torch.float64)
        start = 0
        for piece in pieces:
            found = record(self.model, piece)
            check_finite(self.model, piece, found.losses, start)
            totals += (self.losses(found, layer, piece, bar) - found.losses).double().cpu().sum(1)
            start += len(piece)
        return totals / start

    def losses(self, found: Recording, layer: int, piece: Tensor, bar: tqdm) -> Tensor:
        """Losses ``[sets, n]`` of one micro-batch, from the family's layer on."""
        stack = max(1, default_size(piece) // len(piece))
        rows = []
        for first in range(0, len(self.groups), stack):
            rows.append(self._stacked(found, layer, piece, self.groups[first : first + stack]))
            bar.update(len(rows[-1]))
        return torch.cat(rows)

    def _stacked(
        self, found: Recording, layer: int, piece: Tensor, groups: Sequence[Sequence[int]]
    ) -> Tensor:
        outputs = []
        for group in groups:
            with zeroed_in_place(self.tensors, [(piece, group) for piece in self.family.slices]):
                outputs.append(found.calls[layer](found.hidden[layer]))
        with starting_after(found.calls, layer, torch.cat(outputs)):
            losses = token_losses(self.model, piece.repeat(len(groups), 1)).view(len(groups), len(piece))
        if not bool(torch.isfinite(losses).all()):
            bad = list(groups[int((~torch.isfinite(losses)).any(1).nonzero()[0])])
            named = f"group {bad[0]}" if len(bad) == 1 else f"a set of {len(bad)} groups"
            raise FloatingPointError(
                f"the loss is not finite once {named} of {self.family.name} is zeroed; no scores made"
            )
        return losses
