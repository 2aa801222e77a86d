"""Scores of all families in one unit: the nats that their removal really costs."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.discovery.units import depth_units
from pruner_lib.importance.ablation import Ablation, layer_index, tensors_of
from pruner_lib.importance.calibration import (
    check_batches,
    default_size,
    mean_loss,
    memory_advice,
    micro_batches,
    progress_bar,
    untouched,
)
from pruner_lib.importance.chain import NotAChain, record, starting_after
from pruner_lib.importance.loss_curve import Costs, how_many_sets, scores_in_nats
from pruner_lib.importance.measures import MEASURES, Measure
from pruner_lib.importance.refitting import LayerReaders, Readers, Weights
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.importance.streams import Stream
from pruner_lib.readers.fitting import too_few

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap


def scale_to_loss(
    model: nn.Module,
    dependencies: DependencyMap,
    scores: ImportanceScores | Mapping[str, Tensor],
    batches: Tensor,
    *,
    ratio: float | Sequence[float] = 1 / 3,
    growth: float = 2.0,
    measure: str = "loss",
    compensate: Tensor | None = None,
    ridge: float = 0.1,
    families: str | GroupFamily | Iterable[str | GroupFamily] | None = None,
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> ImportanceScores:
    r"""Rescale each family's scores so that what they say of its lowest groups is what these really cost.

    Let S(k) be the sum of a family's k lowest scores, n groups in all, and m = ratio · n of them the part
    whose cost ΔL is measured, zeroed together in the otherwise whole model. The k-th lowest gets

        s'_k = max(ΔL, σ) · [ (S(k) / S(m))^p − (S(k−1) / S(m))^p ]     (nats per token)

    so that the m lowest sum to what they cost together. p > 1 (``growth``) says that each further group costs
    more than the one before, as it does: near a minimum the loss grows with the square of what is taken away.
    σ is the standard error of ΔL over the sequences: a change that cannot be told from nothing is not taken
    for less than that. Where the m lowest scores are all zero (neurons that never fire), ``ratio`` is of the
    groups above zero, and the zeros are zeroed with them; where the m lowest cost nothing (under 1e-6 nats)
    whatever they score, m is doubled until they do. A family of at most 8 groups (KV heads) is measured
    group by group instead: s'_i = max(ΔL({i}), σ_i). The order within larger families stays; how families
    compare does not, which a criterion alone says badly: a head and a neuron, the first layer and the last.

    **Several ratios** replace the power law by what is measured: s'_k = F(k) − F(k−1), F the largest convex
    curve below the measured points, straight in S between them and ``growth`` times steeper beyond the last.
    Families of at most 8 groups are then also measured with their 2, 3, … n − 1 lowest gone together.

    **Compensation** puts right a part of what a cut breaks, and far more of one than of another: a head that
    attends to the first token is nearly a constant. With ``compensate`` the modules that read a family
    are fitted again on that text before its cost is measured, by ridge regression with earlier layers whole:

        W'_K = W_K + W_S C_SK (C_KK + λ c I)⁻¹,   C = Σ_t h_t h_tᵀ / rms_t²,   S gone, K kept

    **Divergence** is KL(p ‖ q) between the predictions of the whole model and the changed one. On the same
    text it tells apart changes several times smaller than the loss does, for it does not depend on which
    token came.

    Example:
        >>> scores = estimate_importance(model, dependencies, batches, criterion="wanda")
        >>> nats = scale_to_loss(model, dependencies, scores, batches[:16], ratio=(1 / 3, 2 / 3),
        ...                      measure="divergence", compensate=batches[16:])
        >>> plan = plan_pruning(dependencies, nats, target_params=0.8, preset="best")
        >>> pruned = prune(model, plan, compensate=batches)

    Args:
        model: a causal language model; comes back as it was.
        dependencies: what ``discover`` found in it.
        scores: at least zero. Those of whole layers (``score_layers(…, measure="loss")`` gives nats) may be
            among them and come back as they are.
        batches: token ids ``[N, L]``, N ≥ 2; a few thousand tokens are enough.
        ratio: share of a family that is zeroed, in (0, 1], best near what will be pruned; or several.
        growth: p, at least 1; 1 keeps the scores' own proportions.
        measure: ``"loss"``, the change of next-token cross-entropy, or ``"divergence"``.
        compensate: token ids ``[N, L]`` that the fits see, some ten thousand, and none of ``batches``, where
            a fit would look better than it is; None measures the cut alone. Readers outside the layers,
            shared ones, and experts that a router picks stay as cut.
        ridge: λ of these fits, above 0.
        families: which to scale; all that have scores if None. One of which no group may go (experts that a
            router needs all of) is left out.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Scores of these families in nats; their criterion is noted as ``"<criterion>, scaled to the loss"``
        (or divergence).

    Raises:
        ValueError: a ratio outside (0, 1], a growth below 1, a ridge of 0, an unknown measure, unusable
            batches, negative scores, scores of another size than their family, no family; ``compensate``
            where layers do not hand one hidden state on.
        FloatingPointError: a loss, or what a reader reads, that is NaN or infinite.

    Warns:
        UserWarning: with ``compensate``, families that are measured as cut all the same (their channels are
            normed together, or they run through the whole model), and readers with too little text.

    Source: the idea of measuring layers instead of guessing is Li et al. (arXiv 1608.08710); the scaling is
    this project's own.
    """
    ratios = check_scaling(ratio=ratio, growth=growth, measure=measure, ridge=ridge)
    batches = check_batches(model, batches)
    text = None if compensate is None else check_batches(model, compensate)
    if len(batches) < 2:
        raise ValueError("scale_to_loss needs at least 2 sequences, to tell a loss change from noise")
    if not isinstance(scores, ImportanceScores):
        scores = ImportanceScores.from_dict(scores)
    units = depth_units(dependencies)
    chosen = _chosen(dependencies, [name for name in scores if name not in units], families)
    for family in chosen:
        _check_scores(family, scores[family.name])
    pieces = micro_batches(batches, default_size(batches) if micro_batch_size is None else micro_batch_size)
    total = len(pieces) * sum(how_many_sets(family.size, ratios) for family in chosen)
    scaled: dict[str, Tensor] = {}
    with (
        untouched(model),
        memory_advice(batches),
        torch.no_grad(),
        progress_bar(total, "scaling to the loss", progress) as bar,
    ):
        mean_loss(model, pieces)  # names what is not finite before anything is zeroed
        meter = _Meter(model, dependencies, pieces, MEASURES[measure], bar, micro_batch_size)
        for family, costs in meter.families(chosen, text, ridge):
            most = _most(family)
            scaled[family.name] = scores_in_nats(scores[family.name], ratios, growth, costs, most)
    meter.warn(text)
    scaled = {family.name: scaled[family.name] for family in chosen}
    scaled |= {name: scores[name] for name in scores if families is None and name in units}
    criterion = f"{scores.criterion or 'scores'}, scaled to the {measure}"
    return dataclasses.replace(scores, scores=scaled, criterion=criterion)


def check_scaling(
    *,
    ratio: float | Sequence[float] = 1 / 3,
    growth: float = 2.0,
    measure: str = "loss",
    ridge: float = 0.1,
    micro_batch_size: int | None = None,
) -> list[float]:
    """The shares to measure, once the options of :func:`scale_to_loss` are seen to be usable.

    Raises:
        ValueError: one that is not.
    """
    found = list(ratio) if isinstance(ratio, Sequence) else [ratio]
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(
            f"ratio {ratio} is outside (0, 1]: it is the share of each family that is zeroed, or several"
        )
    if growth < 1:
        raise ValueError(f"growth must be at least 1, not {growth}: no group costs less than the one before")
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; valid are {', '.join(MEASURES)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, not {ridge}: without it a fit may have no solution")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, not {micro_batch_size}")
    return found


def _check_scores(family: GroupFamily, values: Tensor) -> None:
    """Whether they are this family's, and sizes."""
    if len(values) != family.size:
        raise ValueError(
            f"{len(values)} scores for the {family.size} groups of {family.name}; score this model, with the "
            "map that is given here"
        )
    if float(values.min()) < 0:
        raise ValueError(f"scores of {family.name} are negative; loss changes are scaled from sizes")


def _most(family: GroupFamily) -> int:
    """How many groups may go together: a router needs as many experts as it chooses for a token."""
    return family.size if family.at_least == 1 else family.size - family.at_least


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
    return [family for family in map(dependencies.family, names) if _most(family) > 0]


class _Meter:
    """Measures sets of groups, layer by layer: one hidden state per token is held, whatever the depth.

    Args:
        model, dependencies: whole.
        pieces: token ids ``[n, L]`` each.
        measure: how the model without a set compares with the whole one.
        bar: counts sets and pieces.
        rows: sequences run at once; None for about 2048 tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        dependencies: DependencyMap,
        pieces: list[Tensor],
        measure: Measure,
        bar: tqdm,
        rows: int | None,
    ) -> None:
        self.model, self.dependencies, self.pieces = model, dependencies, pieces
        self.measure, self.bar, self.rows = measure, bar, rows
        self._references: dict[int, Tensor] = {}
        self._as_cut: list[str] = []  # families that were to be fitted
        self._thin: dict[str, int] = {}

    def families(
        self, chosen: Sequence[GroupFamily], text: Tensor | None, ridge: float
    ) -> Iterator[tuple[GroupFamily, Costs]]:
        """Each family, the first layer's first, with what measures its sets while it is the current one."""
        inside: dict[int, list[GroupFamily]] = {}
        whole: list[GroupFamily] = []
        for family in chosen:
            layer = layer_index(self.model, family)
            (whole if layer is None else inside.setdefault(layer, [])).append(family)
        try:
            if inside:
                yield from self._by_layer(inside, text, ridge)
        except NotAChain as error:
            if text is not None:
                raise ValueError(
                    f"cannot fit the readers of {type(self.model).__name__}: {error}. Leave compensate out"
                ) from error
            whole = list(chosen)
        if text is not None:
            self._as_cut = [family.name for family in whole]
        for family in whole:
            yield family, partial(self._whole, family)

    def warn(self, text: Tensor | None) -> None:
        """Say where a fit was asked for and there was none, or hardly one."""
        if self._as_cut:
            more = f" and {len(self._as_cut) - 1} more families" if len(self._as_cut) > 1 else ""
            warnings.warn(
                f"the costs of {self._as_cut[0]}{more} are measured as cut, without a fit: a norm averages "
                "over what remains of them, or they run through the whole model. Others may look cheaper",
                stacklevel=3,
            )
        if self._thin and text is not None:
            warnings.warn(too_few(text.numel(), self._thin), stacklevel=3)

    def _by_layer(
        self, inside: Mapping[int, list[GroupFamily]], text: Tensor | None, ridge: float
    ) -> Iterator[tuple[GroupFamily, Costs]]:
        self._last = [record(self.model, piece).hidden[-1] for piece in self.pieces]
        self._stream = Stream(self.model, self.pieces)
        readers = None
        if text is not None:
            local = itertools.chain.from_iterable(inside.values())
            readers = Readers(self.model, self.dependencies, local, text, ridge, self.rows)
        for layer in range(1 + max(inside)):
            found = readers.next_layer() if readers else None
            self._thin |= found.thin if found else {}
            for family in inside.get(layer, []):
                yield family, partial(self._from_layer, family, found)
            self._stream.advance([self._stream.run(piece, ())[0] for piece in range(len(self.pieces))])

    def _from_layer(self, family: GroupFamily, readers: LayerReaders | None, sets: list[list[int]]) -> Tensor:
        refits = [readers.without(family, groups) for groups in sets] if readers else []
        ablation, stream = self._ablation(family, sets, refits), self._stream
        rows = []
        for number, piece in enumerate(self.pieces):
            calls, hidden = stream.calls(number), stream.hidden[number]
            rows.append(ablation.changes(calls, stream.at, hidden, piece, self._reference(number), self.bar))
        return torch.cat(rows, 1)

    def _reference(self, number: int) -> Tensor:
        """What the whole model says of a piece."""
        if number not in self._references:
            calls = self._stream.calls(number)
            if not self.measure.light:  # as large as the logits: one is held
                self._references.clear()
            with starting_after(calls, len(calls) - 1, self._last[number]):
                self._references[number] = self.measure.reference(self.model, self.pieces[number])
        return self._references[number]

    def _whole(self, family: GroupFamily, sets: list[list[int]]) -> Tensor:
        ablation = self._ablation(family, sets, [])
        return torch.cat([ablation.whole([piece], self.bar) for piece in self.pieces], 1)

    def _ablation(self, family: GroupFamily, sets: list[list[int]], refits: list[Weights]) -> Ablation:
        tensors = tensors_of(self.model, family)
        options = (tensors, self.measure, refits, self.rows)
        return Ablation(self.model, self.dependencies, family, sets, *options)
