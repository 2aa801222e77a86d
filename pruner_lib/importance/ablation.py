"""Ground truth: how much the loss really changes when a group is zeroed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    untouched,
)
from pruner_lib.importance.chain import Call, NotAChain, record, starting_after
from pruner_lib.importance.estimate import check_family
from pruner_lib.importance.measures import MEASURES, Measure
from pruner_lib.importance.refitting import Weights, refitted
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
        sets = [[group] for group in chosen]
        ablation = Ablation(model, dependencies, found, sets, tensors_of(model, found), rows=micro_batch_size)
        bar = progress_bar(len(pieces) * len(chosen), f"zeroing {found.name}", progress)
        with bar:
            if layer is not None:
                try:
                    return ablation.from_layer(layer, pieces, bar).mean(1)
                except NotAChain:
                    bar.reset()
            mean_loss(model, pieces)  # names what is not finite before anything is zeroed
            return ablation.whole(pieces, bar).mean(1)


def layer_index(model: nn.Module, family: GroupFamily) -> int | None:
    """The decoder layer that holds all of a family's slices; None if none does, or a norm must follow.

    A weight that another layer uses as well lies in both.
    """
    if family.normed_by:
        return None
    path, _ = layer_list(model)
    cut = {piece.parameter for piece in family.slices}
    everywhere = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    held = {id(tensor) for name, tensor in everywhere if name in cut}
    shared = {name for name, tensor in everywhere if id(tensor) in held and name.startswith(f"{path}.")}
    return layer_of(cut | shared, path)


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
    """The sets of groups to zero, each in turn, and the two ways to do it.

    Attributes:
        model, dependencies: whole.
        family: whose groups.
        groups: the sets.
        tensors: parameters that hold the family's slices.
        measure: how the model without a set compares with the whole one.
        refits: per set, what its readers become; none where they stay as they are.
        rows: sequences behind the layer at once; None for about 2048 tokens.
    """

    model: nn.Module
    dependencies: DependencyMap
    family: GroupFamily
    groups: Sequence[Sequence[int]]
    tensors: Mapping[str, Tensor]
    measure: Measure = MEASURES["loss"]
    refits: Sequence[Weights] = ()
    rows: int | None = None

    def whole(self, pieces: list[Tensor], bar: tqdm) -> Tensor:
        """Changes ``[sets, N]``: one forward pass of the whole model per set and piece."""
        references = [self.measure.reference(self.model, piece) for piece in pieces]
        rows = []
        for place in range(len(self.groups)):
            with self._without(place) as model:
                found = [
                    self.measure.change(model, piece, 1, reference)[0]
                    for piece, reference in zip(pieces, references, strict=True)
                ]
            rows.append(torch.cat(found))
            bar.update(len(pieces))
        return self._finite(torch.stack(rows), 0)

    def from_layer(self, layer: int, pieces: list[Tensor], bar: tqdm) -> Tensor:
        """The same from the family's layer on, several sets at once."""
        found = []
        for start, piece in zip(itertools.accumulate(map(len, pieces), initial=0), pieces, strict=False):
            seen = record(self.model, piece)
            check_finite(self.model, piece, seen.losses, start)
            found.append(self.changes(seen.calls, layer, seen.hidden[layer], piece, seen.losses, bar))
        return torch.cat(found, 1)

    def changes(
        self, calls: list[Call], layer: int, hidden: Tensor, piece: Tensor, reference: Tensor, bar: tqdm
    ) -> Tensor:
        """Changes ``[sets, n]`` of one piece, from the state before the family's layer on."""
        stack = max(1, (self.rows or default_size(piece)) // len(piece))
        rows = []
        for first in range(0, len(self.groups), stack):
            places = range(first, min(first + stack, len(self.groups)))
            outputs = []
            for place in places:
                with self._without(place):
                    outputs.append(calls[layer](hidden))
            with starting_after(calls, layer, torch.cat(outputs)):
                found = self.measure.change(self.model, piece, len(places), reference)
            rows.append(self._finite(found, first))
            bar.update(len(places))
        return torch.cat(rows)

    @contextmanager
    def _without(self, place: int) -> Iterator[nn.Module]:
        """The model without one set."""
        groups = self.groups[place]
        if self.family.normed_by:  # the norm must average over what remains; the oracle's copy knows how
            yield self.dependencies.zero(self.model, {self.family.name: groups}).eval()
            return
        slices = [(piece, groups) for piece in self.family.slices]
        weights = self.refits[place] if self.refits else {}
        with zeroed_in_place(self.tensors, slices), refitted(weights):
            yield self.model

    def _finite(self, changes: Tensor, first: int) -> Tensor:
        """``[sets, n]`` as they are, the first of them being set number ``first``."""
        if not bool(torch.isfinite(changes).all()):
            bad = list(self.groups[first + int((~torch.isfinite(changes)).any(1).nonzero()[0])])
            named = f"group {bad[0]}" if len(bad) == 1 else f"a set of {len(bad)} groups"
            raise FloatingPointError(
                f"the loss is not finite once {named} of {self.family.name} is zeroed; no scores made"
            )
        return changes
