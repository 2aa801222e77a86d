"""Linear modules as matrices ``[out, in]``, whichever way round their weights are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap


def as_matrix(module: nn.Module) -> Tensor:
    """A linear module's weight as float64 ``[out, in]``."""
    weight = module.weight.detach().double()  # type: ignore[operator, union-attr]
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write ``[out, in]`` and a bias into a linear module, in place, rounded once."""
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # type: ignore[operator, union-attr]
        if bias is not None:
            module.bias.copy_(bias)  # type: ignore[operator, union-attr]


def matrices(layer: nn.Module, prefix: str) -> Iterator[tuple[str, str, int, int]]:
    """``(path, weight, input dimension, output dimension)`` of the linear modules of a layer."""
    for path, module in layer.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield path, f"{prefix}{path}.weight", 1, 0
        elif isinstance(module, Conv1D):
            yield path, f"{prefix}{path}.weight", 0, 1


def residual_writers(dependencies: DependencyMap, layer: nn.Module, prefix: str) -> list[str]:
    """Paths of the linear modules of a layer whose output is added to the residual stream."""
    residual = {
        (piece.parameter, piece.dim)
        for family in dependencies.families
        if family.kind == "hidden_channel"
        for piece in family.slices
    }
    return [
        path
        for path, weight, _, outward in matrices(layer, f"{prefix}.")
        if (dependencies.aliases.get(weight, weight), outward) in residual
    ]
