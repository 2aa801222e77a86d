"""Scores of all families in one unit: the nats of loss that their removal really costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.discovery.units import depth_units
from pruner_lib.importance.ablation import Ablation, layer_index, tensors_of
from pruner_lib.importance.calibration import (
    check_batches,
    check_finite,
    default_size,
    memory_advice,
    micro_batches,
    progress_bar,
    untouched,
)
from pruner_lib.importance.chain import NotAChain, record
from pruner_lib.importance.scores import ImportanceScores

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

MEASURED_ONE_BY_ONE = 8


def scale_to_loss(
    model: nn.Module,
    dependencies: DependencyMap,
    scores: ImportanceScores | Mapping[str, Tensor],
    batches: Tensor,
    *,
    ratio: float = 1 / 3,
    growth: float = 2.0,
    families: str | GroupFamily | Iterable[str | GroupFamily] | None = None,
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> ImportanceScores:
    r"""Rescale each family's scores so that what they say of its lowest groups is what the loss says.

    Let S(k) be the sum of a family's k lowest scores, n groups in all, and m = ratio · n of them the part
    whose loss change ΔL is measured, zeroed together in the otherwise whole model. The k-th lowest gets

        s'_k = max(ΔL, σ) · [ (S(k) / S(m))^p − (S(k−1) / S(m))^p ]     (nats of next-token cross-entropy)

    so that the m lowest sum to what they cost together. p > 1 (``growth``) says that each further group costs
    more than the one before, as it does: near a minimum the loss grows with the square of what is taken away.
    σ is the standard error of ΔL over the sequences: a change that cannot be told from nothing is not taken
    for less than that. Where the m lowest scores are all zero (neurons that never fire), ``ratio`` is of the
    groups above zero, and the zeros are zeroed with them. A family of at most 8 groups (KV heads) is measured
    group by group instead: s'_i = max(ΔL({i}), σ_i). The order within larger families stays; how families
    compare does not, which a criterion alone says badly: a head and a neuron, the first layer and the last.

    Example:
        >>> scores = estimate_importance(model, dependencies, batches, criterion="wanda")
        >>> nats = scale_to_loss(model, dependencies, scores, batches)
        >>> plan_pruning(dependencies, nats, target_params=0.8, preset="best")

    Args:
        model: a causal language model; comes back as it was.
        dependencies: what ``discover`` found in it.
        scores: at least zero. Those of whole layers (``score_layers(…, measure="loss")`` gives nats) may be
            among them and come back as they are.
        batches: token ids ``[N, L]``, N ≥ 2; a few thousand tokens are enough.
        ratio: share of a family that is zeroed, in (0, 1]; best near the share that will be pruned.
        growth: p, at least 1; 1 keeps the scores' own proportions.
        families: which to scale; all that have scores if None.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Scores of these families in nats; their criterion is noted as ``"<criterion>, scaled to the loss"``.

    Raises:
        ValueError: a ratio outside (0, 1], a growth below 1, unusable batches, negative scores, no family.
        FloatingPointError: a loss that is NaN or infinite.

    Source: the idea of measuring layers instead of guessing is Li et al. (arXiv 1608.08710); the scaling is
    this project's own.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} is outside (0, 1]: it is the share of each family that is zeroed")
    if growth < 1:
        raise ValueError(f"growth must be at least 1, not {growth}: no group costs less than the one before")
    batches = check_batches(model, batches)
    if len(batches) < 2:
        raise ValueError("scale_to_loss needs at least 2 sequences, to tell a loss change from noise")
    if not isinstance(scores, ImportanceScores):
        scores = ImportanceScores.from_dict(scores)
    units = depth_units(dependencies)
    chosen = _chosen(dependencies, [name for name in scores if name not in units], families)
    for family in chosen:
        if float(scores[family.name].min()) < 0:
            raise ValueError(f"scores of {family.name} are negative; loss changes are scaled from sizes")
    sets = {family.name: _sets(family, scores[family.name], ratio) for family in chosen}
    size = default_size(batches) if micro_batch_size is None else micro_batch_size
    pieces = micro_batches(batches, size)
    with untouched(model), memory_advice(batches), torch.no_grad():
        changes = _changes(model, dependencies, chosen, sets, pieces, progress)
    scaled = {
        name: _scaled(scores[name], sets[name], changes[name], growth)
        for name in (family.name for family in chosen)
    }
    scaled |= {name: scores[name] for name in scores if families is None and name in units}
    criterion = f"{scores.criterion or 'scores'}, scaled to the loss"
    return dataclasses.replace(scores, scores=scaled, criterion=criterion)


def _chosen(
    dependencies: DependencyMap,
    scored: list[str],
    families: str | GroupFamily | Iterable[str | GroupFamily] | None,
) -> list[GroupFamily]:
    """The families to scale."""
    listed = [families] if isinstance(families, (str, GroupFamily)) else families
    names = scored if listed is None else [f if isinstance(f, str) else f.name for f in listed]
    if not names:
        found = "the scores hold none" if families is None else "families is empty"
        raise ValueError(f"there is no family to scale: {found}; name some that have scores, or leave it out")
    return [dependencies.family(name) for name in names]


def _sets(family: GroupFamily, values: Tensor, ratio: float) -> list[list[int]]:
    """What is zeroed together: each group of a small family, the lowest part of a large one."""
    if family.size <= MEASURED_ONE_BY_ONE:
        return [[group] for group in range(family.size)]
    order, count = values.argsort(stable=True), max(1, round(ratio * family.size))
    zeros = int((values == 0).sum())
    if count <= zeros < family.size:  # their sum is no measure; go on to groups that say something
        count = zeros + max(1, round(ratio * (family.size - zeros)))
    return [order[:count].tolist()]


def _changes(
    model: nn.Module,
    dependencies: DependencyMap,
    families: Sequence[GroupFamily],
    sets: dict[str, list[list[int]]],
    pieces: list[Tensor],
    progress: bool | None,
) -> dict[str, Tensor]:
    """Loss changes ``[sets, N]`` of every family, per sequence; each piece's layers are recorded once."""
    rows: dict[str, list[Tensor]] = {family.name: [] for family in families}
    total = len(pieces) * sum(len(sets[family.name]) for family in families)
    start = 0
    with progress_bar(total, "scaling to the loss", progress) as bar:
        for piece in pieces:
            try:
                found = record(model, piece)
            except NotAChain:
                found = None
            if found is not None:
                check_finite(model, piece, found.losses, start)
            for family in families:
                ablation = Ablation(model, dependencies, family, sets[family.name], tensors_of(model, family))
                layer = layer_index(model, family)
                if found is None or layer is None:
                    each = [ablation.whole([row[None]], tqdm(disable=True)) for row in piece]
                    rows[family.name].append(torch.stack(each, 1))
                    bar.update(len(sets[family.name]))
                else:
                    losses = ablation.losses(found, layer, piece, bar)
                    rows[family.name].append((losses - found.losses).double().cpu())
            start += len(piece)
    return {name: torch.cat(parts, 1) for name, parts in rows.items()}


def _scaled(values: Tensor, sets: list[list[int]], changes: Tensor, growth: float) -> Tensor:
    """Scores in nats from loss changes ``[sets, N]``."""
    error = changes.std(1) / changes.shape[1] ** 0.5
    measured = changes.mean(1).maximum(error).clamp(min=torch.finfo(torch.float64).tiny)
    if len(sets) == len(values):
        return measured
    ordered, order = values.double().sort(stable=True)
    total = ordered.cumsum(0)
    lowest = float(total[len(sets[0]) - 1])
    if lowest == 0:  # every score is zero, which is zero in any unit
        return values.double()
    curve = float(measured[0]) * (total / lowest) ** growth
    return torch.empty_like(curve).scatter_(0, order, curve.diff(prepend=curve.new_zeros(1)))
