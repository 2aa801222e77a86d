"""Scores of all groups, estimated from weights and the gradients of a calibration loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruner_lib.discovery.families import CoupledSlice, GroupFamily
from pruner_lib.importance.calibration import backward_pass, check_batches, micro_batches, untouched
from pruner_lib.importance.criteria import Criterion, get_criterion, get_reduction, index_scores
from pruner_lib.importance.scores import ImportanceScores

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

IndexScores = Mapping[str, list[Tensor]]


def estimate_importance(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor | None,
    *,
    criterion: str | Criterion = "taylor_first",
    reduction: str = "sum",
    families: Iterable[str | GroupFamily] | None = None,
    include_vectors: bool = True,
    micro_batch_size: int | None = None,
    seed: int = 0,
    source: str | None = None,
) -> ImportanceScores:
    r"""Score every group: element by element, summed to slices, reduced to one number per group.

    With s(W, g, h) the criterion (:mod:`pruner_lib.importance.criteria` lists the equations) and
    I the indices of dimension d of a parameter that belong to a group, the score of that slice is
    Σ_{i ∈ I} s_i, where s_i sums s over the other dimensions; the group's score is the reduction
    over its slices. A head's score is therefore the sum over its own channels, and under
    grouped-query attention a KV head takes in exactly the query heads that go with it.

    One forward and one backward pass; each gradient is folded into scores and freed as it becomes
    ready. With micro-batches the gradients are instead added up, in float32 or better, until the
    last one. Second moments take one pass per sequence, whatever ``micro_batch_size``.

    The model is left exactly as it was, also after an exception; a frozen model works.

    Args:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]`` from ``load_calibration``; None for criteria that need no text.
        criterion: random, l1, l2, taylor_vector, taylor_first, taylor_second, taylor_mixed, or your own.
        reduction: sum, product, max, last (the slice that reads the group last) or mean.
        families: names or families to score; all that can be cut if None.
        include_vectors: whether norm weights and biases take part.
        micro_batch_size: sequences run at once; None for all. Lower it when memory runs out.
        seed: of the random criterion; the draw of a family depends on nothing else but its name.
        source: what the text was, recorded with the scores.

    Returns:
        Scores in float64, ``[size]`` per family.

    Raises:
        UnknownFamilyError: a family that is not in ``dependencies``.
        ValueError: an unknown criterion or reduction, unusable batches, parameters that do not
            match ``dependencies``, gradients that are all zero.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.

    Source: LLM-Pruner, arXiv 2305.11627, section 3.2.
    """
    chosen, reduce = get_criterion(criterion), get_reduction(reduction)
    selected = _select(dependencies, families)
    parameters = _scored_parameters(model, dependencies, selected, include_vectors)
    used = check_batches(model, batches) if chosen.needs_batches else None
    if chosen.elementwise is None:
        scores = {family.name: _draw(family, seed) for family in selected}
    else:
        by_index = _index_scores(model, chosen, parameters, used, micro_batch_size)
        scores = {family.name: reduce(slice_scores(family, by_index)) for family in selected}
    return ImportanceScores(
        scores=scores,
        criterion=chosen.name,
        reduction=reduction if chosen.elementwise is not None else None,
        source=source if used is not None else None,
        seed=seed if chosen.elementwise is None else None,
        num_samples=len(used) if used is not None else 0,
        seq_len=used.shape[1] if used is not None else 0,
    )


def slice_scores(family: GroupFamily, by_index: IndexScores) -> Tensor:
    """Scores of a family's slices ``[slices, size]``: sums over the indices of each group.

    Args:
        family: its slices of parameters that are not in ``by_index`` are left out.
        by_index: parameter name to one vector per dimension.
    """
    rows = [
        by_index[piece.parameter][piece.dim][torch.from_numpy(piece.index)].reshape(family.size, -1).sum(1)
        for piece in family.slices
        if piece.parameter in by_index
    ]
    return torch.stack(rows)


def _select(
    dependencies: DependencyMap, families: Iterable[str | GroupFamily] | None
) -> tuple[GroupFamily, ...]:
    if families is None:
        return tuple(family for family in dependencies.families if family.cuttable)
    listed = [families] if isinstance(families, (str, GroupFamily)) else list(families)
    return tuple(
        dependencies.family(family.name if isinstance(family, GroupFamily) else family) for family in listed
    )


def _scored_parameters(
    model: nn.Module, dependencies: DependencyMap, families: Iterable[GroupFamily], include_vectors: bool
) -> tuple[str, ...]:
    """Names of the parameters whose slices the families hold, checked against the model."""
    present = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names: dict[str, None] = {}
    for family in families:
        pieces = [piece for piece in family.slices if piece.parameter not in buffers]
        for piece in pieces:
            _check_slice(family, piece, present, dependencies)
        taken = [piece.parameter for piece in pieces if include_vectors or present[piece.parameter].ndim > 1]
        if not taken:
            hint = "leave it out, or set include_vectors=True"
            raise ValueError(f"{family.name} has no weight to score; {hint}")
        names.update(dict.fromkeys(taken))
    return tuple(names)


def _check_slice(
    family: GroupFamily, piece: CoupledSlice, present: Mapping[str, Tensor], dependencies: DependencyMap
) -> None:
    found = present.get(piece.parameter)
    expected = dependencies.shapes.get(piece.parameter)
    if found is None or (expected is not None and tuple(found.shape) != tuple(expected)):
        state = "has no such parameter" if found is None else f"holds {list(found.shape)}"
        raise ValueError(
            f"{family.name} does not belong to this model: {piece.parameter} is "
            f"{list(expected) if expected is not None else 'expected'} in the dependencies, the model "
            f"{state}. Call discover on this model"
        )
    if not found.is_floating_point():
        raise ValueError(
            f"{piece.parameter} is stored as {found.dtype}: quantised weights cannot be scored; "
            "load the model in float32, bfloat16 or float16"
        )
    if found.is_meta:
        raise ValueError(f"{piece.parameter} is on the meta device, without values; load the weights")


def _draw(family: GroupFamily, seed: int) -> Tensor:
    """Uniform scores that depend on the seed and the family's name alone, not on what else is scored."""
    digest = hashlib.sha256(f"{seed}/{family.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(family.size, generator=generator, dtype=torch.float64)


def _index_scores(
    model: nn.Module, criterion: Criterion, names: tuple[str, ...], batches: Tensor | None, size: int | None
) -> IndexScores:
    if batches is None:
        return {name: index_scores(criterion, model.get_parameter(name), None, None) for name in names}
    pieces = micro_batches(batches, 1 if criterion.needs_second_moment else size)
    with untouched(model, names) as wanted:
        fold = _Fold(criterion, wanted, num_pieces=len(pieces))
        try:
            backward_pass(model, pieces, wanted, fold.take)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"out of memory in a pass over {len(pieces[0])} sequences of {batches.shape[1]} tokens; "
                "lower micro_batch_size, use shorter sequences, or score fewer families at once (families=…)"
            ) from error
        by_index = fold.finish()
    if not any(bool(vector.any()) for vectors in by_index.values() for vector in vectors):
        raise ValueError(
            "every gradient is zero, so no group can be told from another; check that the model's loss "
            "depends on its weights (all parameters zero? a single-token vocabulary?)"
        )
    return by_index


@dataclass
class _Fold:
    """Turns gradients into index scores: at once if there is one piece, else after the last one."""

    criterion: Criterion
    parameters: Mapping[str, nn.Parameter]
    num_pieces: int
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)

    def take(self, name: str, gradient: Tensor, share: float) -> None:
        if self.num_pieces == 1 and not self.criterion.needs_second_moment:
            self.scores[name] = index_scores(self.criterion, self.parameters[name], gradient, None)
            return
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        if self.criterion.needs_gradient:
            self._add(self.gradients, name, wide, share)
        if self.criterion.needs_second_moment:
            self._add(self.moments, name, wide.square(), share)

    @staticmethod
    def _add(store: dict[str, Tensor], name: str, term: Tensor, share: float) -> None:
        if name in store:
            store[name].add_(term, alpha=share)
        else:
            store[name] = term * share

    def finish(self) -> dict[str, list[Tensor]]:
        for name, parameter in self.parameters.items():
            if name in self.scores:
                continue
            # A parameter that no sequence reached (an idle expert) has gradient zero.
            zero = torch.zeros_like(parameter, dtype=torch.float32)
            self.scores[name] = index_scores(
                self.criterion,
                parameter,
                self.gradients.pop(name, zero) if self.criterion.needs_gradient else None,
                self.moments.pop(name, zero) if self.criterion.needs_second_moment else None,
            )
        return self.scores
