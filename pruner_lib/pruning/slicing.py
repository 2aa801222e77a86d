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


def sliced_copy(model: nn.Module, plan: PruningPlan, spared: tuple[str, ...] = ()) -> nn.Module:
    """A deep copy whose parameters and buffers hold only what ``plan`` keeps.

    Tensors are sliced on their way into the copy, so memory peaks at the two models. Tied
    weights stay one parameter; dtype, device, ``requires_grad`` and training mode are kept.

    Args:
        model: left as it is.
        plan: made for this model.
        spared: paths of modules that the caller takes out of the copy next. What the plan leaves whole in
            them is the given model's own, not a copy.

    Returns:
        The copy. Its modules still believe the old head counts; its ``in_features`` and the like
        are right.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in _whole_inside(model, plan, spared)}
    for name, parameter in model.named_parameters():
        if id(parameter) in memo:
            continue
        value = nn.Parameter(_sliced(parameter.detach(), name, plan), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = value
    for name, buffer in model.named_buffers():
        if id(buffer) not in memo:
            memo[id(buffer)] = _sliced(buffer.detach(), name, plan)
    pruned = copy.deepcopy(model, memo)
    follow_shapes(pruned)
    return pruned


def _whole_inside(model: nn.Module, plan: PruningPlan, paths: tuple[str, ...]) -> list[torch.Tensor]:
    """Tensors that lie in those modules alone, tied to nothing outside, and lose nothing."""
    inside = tuple(f"{path}." for path in paths)
    if not inside:
        return []
    places: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        places.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [
        tensors[key]
        for key, names in places.items()
        if all(name.startswith(inside) and not plan.removed_indices(name) for name in names)
    ]


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
