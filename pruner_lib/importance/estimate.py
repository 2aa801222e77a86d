"""Scores of all groups, estimated from weights and the gradients of a calibration loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruner_lib.discovery.families import CoupledSlice, GroupFamily
from pruner_lib.importance.calibration import check_batches
from pruner_lib.importance.criteria import Criterion, get_criterion, get_reduction
from pruner_lib.importance.evidence import PassOptions, score_parameters
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.importance.scoring import ByDim, InputUse, Known, index_scores

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

IndexScores = Mapping[str, ByDim]

_LESS_MEMORY = (
    "score fewer families at once (families=…)",
    'hold one layer\'s gradients at a time (accumulate="layers")',
)


def estimate_importance(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor | None,
    *,
    criterion: str | Criterion = "taylor_second",
    reduction: str = "sum",
    families: Iterable[str | GroupFamily] | None = None,
    include_vectors: bool = True,
    seed: int | None = None,
    source: str | None = None,
    micro_batch_size: int | None = None,
    accumulate: str = "auto",
    progress: bool | None = None,
) -> ImportanceScores:
    r"""Score every group: element by element, summed to slices, reduced to one number per group.

    With s the criterion's score of an element (:mod:`pruner_lib.importance.criteria` lists the
    equations) and I the indices of dimension d of a parameter that belong to a group, the score of
    that slice is Σ_{i ∈ I} s_i, where s_i sums s over the other dimensions; the group's score is the
    reduction over its slices. A head's score is therefore the sum over its own channels, and under
    grouped-query attention a KV head takes in exactly the query heads that go with it.

    The weights alone need no text; inputs take a forward pass; gradients one forward and one backward
    pass, each folded into scores and freed as it becomes ready. Second moments take one backward pass
    per sequence, whatever ``micro_batch_size``. Sums are kept in float32 or better whatever the model's
    type. The model is left exactly as it was, also after an exception; a frozen one works, and one that
    ``device_map`` spread.

    Where ``torch.distributed`` is initialised (``torchrun``), every process must make this call with
    the same arguments; each runs every world-th sequence, and all get the scores of one process.

    Example:
        >>> scores = estimate_importance(model, dependencies, batches, source="books", seed=0)
        >>> scores["layers.5.mlp_neuron"].argsort()[:10]            # the ten that matter least

    Args:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]`` from ``load_calibration``; None for criteria that need no text.
        criterion: random, l1, l2, taylor_vector, taylor_first, taylor_second, taylor_mixed, wanda,
            fluctuation, activation, or your own. The default is among the two that grade best against
            ablation (docs/importance/study.md); the paper's, taylor_first, needs no pass per sequence.
        reduction: sum, product, max, last (the slice that reads the group last) or mean.
        families: names or families to score; all that can be cut if None.
        include_vectors: whether norm weights and biases take part.
        seed: what the batches were drawn with, recorded; of the random criterion, 0 if None. The draw
            of a family depends on nothing else but its name.
        source: what the text was, recorded with the scores.
        micro_batch_size: sequences run at once; None for about 2048 tokens. Lower it when memory runs out.
        accumulate: what is held between several micro-batches: ``"layers"`` the hidden states between the
            layers, one layer's gradients, and a third more time; ``"gradients"`` the gradients of all
            that is scored; ``"auto"`` whichever is less.
        progress: whether a bar is shown; None shows it in a terminal.

    Returns:
        Scores in float64, ``[size]`` per family.

    Raises:
        UnknownFamilyError: a family that is not in ``dependencies``.
        ValueError: an unknown criterion or reduction, no family, unusable batches, parameters that do
            not match ``dependencies``, gradients that are all zero.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.

    Source: LLM-Pruner, arXiv 2305.11627, section 3.2.
    """
    chosen, reduce = get_criterion(criterion), get_reduction(reduction)
    options = PassOptions(micro_batch_size, accumulate, progress, _LESS_MEMORY)
    selected = _select(dependencies, families)
    dims = scored_dims(model, dependencies, selected, include_vectors)
    used = check_batches(model, batches) if chosen.needs_batches else None
    if chosen.scope == "group":
        scores = {family.name: _draw(family, seed or 0) for family in selected}
        return ImportanceScores(scores=scores, criterion=chosen.name, seed=seed or 0)

    def score(name: str, weight: nn.Parameter, known: Known, uses: list[InputUse]) -> ByDim:
        return index_scores(chosen, weight, known, uses, dims[name])

    by_index = score_parameters(model, dims, used, chosen, score, options)
    mean = chosen.scope == "channel"
    return ImportanceScores(
        scores={family.name: reduce(slice_scores(family, by_index, mean=mean)) for family in selected},
        criterion=chosen.name,
        reduction=reduction,
        source=source if used is not None else None,
        seed=seed if used is not None else None,
        num_samples=len(used) if used is not None else 0,
        seq_len=used.shape[1] if used is not None else 0,
    )


def slice_scores(family: GroupFamily, by_index: IndexScores, *, mean: bool = False) -> Tensor:
    """Scores of a family's slices ``[slices, size]``: sums over the indices of each group.

    Args:
        family: its slices whose parameter and dimension are not in ``by_index`` are left out.
        by_index: parameter name to dimension to a vector, one score per index.
        mean: the mean over the indices of a group instead of the sum.

    Raises:
        ValueError: no slice is in ``by_index``.
    """
    rows = []
    for piece in family.slices:
        vector = by_index.get(piece.parameter, {}).get(piece.dim)
        if vector is not None:
            of_group = vector[torch.from_numpy(piece.index)].reshape(family.size, -1)
            rows.append(of_group.mean(1) if mean else of_group.sum(1))
    if not rows:
        raise ValueError(
            f"no slice of {family.name} reads an input, so its channels have no activation; leave it out, or "
            "take a criterion that reads its weights"
        )
    return torch.stack(rows)


def _select(
    dependencies: DependencyMap, families: Iterable[str | GroupFamily] | None
) -> tuple[GroupFamily, ...]:
    if families is None:
        selected = tuple(family for family in dependencies.families if family.cuttable)
    else:
        listed = [families] if isinstance(families, (str, GroupFamily)) else list(families)
        names = [family.name if isinstance(family, GroupFamily) else family for family in listed]
        selected = tuple(dependencies.family(name) for name in names)
    if not selected:
        found = "none can be cut" if families is None else "families is empty"
        raise ValueError(
            f"there is no family to score: {found}. Name some of the {len(dependencies.families)} that "
            'discover found, such as families=dependencies.select("mlp_neuron")'
        )
    return selected


def scored_dims(
    model: nn.Module, dependencies: DependencyMap, families: Iterable[GroupFamily], include_vectors: bool
) -> dict[str, set[int]]:
    """Parameters that hold the families' slices and the dimensions they are cut in, checked.

    Raises:
        ValueError: a slice that the model does not have or whose values cannot be scored.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    dims: dict[str, set[int]] = {}
    for family in families:
        pieces = [piece for piece in family.slices if piece.parameter not in buffers]
        for piece in pieces:
            _check_slice(family, piece, present, dependencies)
        taken = [piece for piece in pieces if include_vectors or present[piece.parameter].ndim > 1]
        if not taken:
            hint = "leave it out, or set include_vectors=True"
            raise ValueError(f"{family.name} has no weight to score; {hint}")
        for piece in taken:
            dims.setdefault(piece.parameter, set()).add(piece.dim)
    return dims


def check_family(model: nn.Module, dependencies: DependencyMap, family: GroupFamily) -> None:
    """Refuse a family of another model.

    Raises:
        ValueError: the model has no tensor of a slice's name and shape.
    """
    present: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    present.update(model.named_buffers(remove_duplicate=False))
    for piece in family.slices:
        _holder(family, piece, present, dependencies)


def _holder(
    family: GroupFamily, piece: CoupledSlice, present: Mapping[str, Tensor], dependencies: DependencyMap
) -> Tensor:
    """The tensor that holds a slice.

    Raises:
        ValueError: the model has none of that name and shape.
    """
    found = present.get(piece.parameter)
    expected = dependencies.shapes.get(piece.parameter)
    if found is None or (expected is not None and tuple(found.shape) != tuple(expected)):
        state = "has no such parameter" if found is None else f"holds {list(found.shape)}"
        raise ValueError(
            f"{family.name} does not belong to this model: {piece.parameter} is "
            f"{list(expected) if expected is not None else 'expected'} in the dependencies, the model "
            f"{state}. Call discover on this model"
        )
    return found


def _check_slice(
    family: GroupFamily, piece: CoupledSlice, present: Mapping[str, Tensor], dependencies: DependencyMap
) -> None:
    found = _holder(family, piece, present, dependencies)
    if not found.is_floating_point():
        raise ValueError(
            f"{piece.parameter} is stored as {found.dtype}: quantised weights cannot be scored; "
            "load the model in float32, bfloat16 or float16"
        )
    if found.is_meta:
        raise ValueError(
            f"{piece.parameter} is on the meta device, without values; load the weights. A device_map that "
            "leaves a part on the disk or in CPU memory does not work, one over several devices does"
        )


def _draw(family: GroupFamily, seed: int) -> Tensor:
    """Uniform scores that depend on the seed and the family's name alone, not on what else is scored."""
    digest = hashlib.sha256(f"{seed}/{family.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(family.size, generator=generator, dtype=torch.float64)
