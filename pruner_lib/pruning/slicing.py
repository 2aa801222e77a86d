"""A copy of a model that never holds the weights that are cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan

# Attributes that repeat a dimension of ``weight``, by the class that keeps them.
_SHAPE_ATTRIBUTES: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (Conv1D, {"nx": 0, "nf": 1}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.Conv1d, {"out_channels": 0}),
    (nn.BatchNorm1d, {"num_features": 0}),
)
SHAPE_NAMES = frozenset({"normalized_shape", *(name for _, names in _SHAPE_ATTRIBUTES for name in names)})


def sliced_copy(
    model: nn.Module, plan: PruningPlan, spared: tuple[str, ...] = (), described: nn.Module | None = None
) -> nn.Module:
    """A deep copy whose parameters and buffers hold only what ``plan`` keeps.

    Tensors are sliced on their way into the copy, so memory peaks at the two models. Tied
    weights stay one parameter; dtype, device, ``requires_grad`` and training mode are kept.

    Args:
        model: left as it is.
        plan: made for this model.
        spared: paths of modules that the caller takes out of the copy next: what belongs to them alone is
            empty there, on the meta device.
        described: the same model already cut, without values; its modules are copied instead.

    Returns:
        The copy. Its modules still believe the old head counts, unless ``described`` knows better; its
        ``in_features`` and the like are right.
    """
    source = model if described is None else described
    into = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    shapes, left_out = plan.new_shapes(), _alone_inside(model, spared)
    memo: dict[int, object] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(into[name]) in memo:
            continue
        if id(tensor) in left_out:
            value = tensor.new_empty(shapes.get(name, tensor.shape), device="meta")
        else:
            value = _sliced(tensor.detach(), name, plan)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(into[name])] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    pruned = copy.deepcopy(source, memo)
    follow_shapes(pruned)
    return pruned


def _alone_inside(model: nn.Module, paths: tuple[str, ...]) -> set[int]:
    """Identities of the tensors that lie in those modules alone, tied to nothing outside."""
    inside = tuple(f"{path}." for path in paths)
    if not inside:
        return set()
    places: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        places.setdefault(id(tensor), []).append(name)
    return {key for key, names in places.items() if all(name.startswith(inside) for name in names)}


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the meta device: shapes and code, no values."""
    return _empty_copy(model, {})


def sliced_meta_copy(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """What :func:`sliced_copy` returns, without values: shapes and code, nothing sliced."""
    empty = _empty_copy(model, plan.new_shapes())
    follow_shapes(empty)
    return empty


def _empty_copy(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    memo: dict[int, object] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        empty = tensor.new_empty(shapes.get(name, tensor.shape), device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def follow_shapes(model: nn.Module) -> None:
    """Set, in place, the attributes that repeat a dimension of a module's own weight."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        for owner, names in _SHAPE_ATTRIBUTES:
            if isinstance(module, owner):
                for attribute, dim in names.items():
                    if isinstance(module.__dict__.get(attribute), int):
                        setattr(module, attribute, weight.shape[dim])
        if isinstance(module.__dict__.get("normalized_shape"), tuple):
            vars(module)["normalized_shape"] = tuple(weight.shape)


def _sliced(tensor: torch.Tensor, name: str, plan: PruningPlan) -> torch.Tensor:
    try:
        kept = plan.kept_indices(name)
    except KeyError:  # discovery lists parameters; a buffer it never saw is copied whole
        kept = {}
    if not kept:
        return tensor.clone()
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
