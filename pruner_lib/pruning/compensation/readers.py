"""Which modules of a layer read what a plan removed, and which write into the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap
    from pruner_lib.pruning.plan import PruningPlan

Matrix = nn.Linear | Conv1D


@dataclass(frozen=True)
class Reader:
    """A linear module to be fitted again.

    Attributes:
        path: of the module inside its layer.
        weight: full name of its weight in the dense model.
        kept_in: indices of its input that stay; None for all.
        kept_out: indices of its output that stay; None for all.
    """

    path: str
    weight: str
    kept_in: Tensor | None
    kept_out: Tensor | None

    def columns(self, dense: nn.Module) -> Tensor:
        """The dense weights of what stays, float64 ``[out, in]``."""
        weight = as_matrix(dense)
        if self.kept_out is not None:
            weight = weight.index_select(0, self.kept_out.to(weight.device))
        if self.kept_in is not None:
            weight = weight.index_select(1, self.kept_in.to(weight.device))
        return weight


def as_matrix(module: nn.Module) -> Tensor:
    """A linear module's weight as float64 ``[out, in]``, whichever way it is stored."""
    weight = module.weight.detach().double()  # type: ignore[operator, union-attr]
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write ``[out, in]`` and a bias into a linear module, in place, rounded once."""
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # type: ignore[operator, union-attr]
        if bias is not None:
            module.bias.copy_(bias)  # type: ignore[operator, union-attr]


def _matrices(layer: nn.Module, prefix: str) -> Iterator[tuple[str, str, int, int]]:
    """``(path, weight, input dimension, output dimension)`` of the linear modules of a layer."""
    for path, module in layer.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield path, f"{prefix}{path}.weight", 1, 0
        elif isinstance(module, Conv1D):
            yield path, f"{prefix}{path}.weight", 0, 1


def readers_of(layer: nn.Module, prefix: str, plan: PruningPlan) -> list[Reader]:
    """Linear modules of a dense layer whose input loses channels.

    A weight that several modules share is left out: fitting it for one would change the others.
    """
    found = []
    shared = set(plan.dependencies.aliases.values())
    for path, weight, inward, outward in _matrices(layer, f"{prefix}."):
        kept = plan.kept_indices(weight)
        if inward in kept and weight not in shared and weight not in plan.dependencies.aliases:
            found.append(Reader(path, weight, kept[inward], kept.get(outward)))
    return found


def left_as_cut(model: nn.Module, plan: PruningPlan, read: set[str]) -> list[str]:
    """Weights that read removed channels and are none of the ``read`` ones.

    A linear module says which of its dimensions is read. Of a weight without one (experts in one tensor,
    routers) this is known from families: the last slice of a family reads it, and a residual channel is read
    by the weights that do not read another family.
    """
    dependencies = plan.dependencies
    inward = {weight: dim for _, weight, dim, _ in _matrices(model, "")}
    tables = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
    names: dict[str, list[str]] = {}
    for alias, parameter in dependencies.aliases.items():
        names.setdefault(parameter, []).append(alias)
    last = {
        (family.slices[-1].parameter, family.slices[-1].dim)
        for family in dependencies.families
        if family.kind != "hidden_channel"
    }
    behind = {parameter for parameter, _ in last}
    found: set[str] = set()
    for family in map(dependencies.family, plan.removal):
        for piece in family.slices:
            own = (piece.parameter, *names.get(piece.parameter, ()))
            linear = [name for name in own if name in inward]
            if linear:
                found.update([name for name in linear if inward[name] == piece.dim][:1])
            elif piece.parameter not in tables and len(dependencies.shapes[piece.parameter]) > 1:
                streams = family.kind == "hidden_channel"
                reads = piece.parameter not in behind if streams else (piece.parameter, piece.dim) in last
                found.update([piece.parameter] if reads else [])
    return sorted(found - read)


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
        for path, weight, _, outward in _matrices(layer, f"{prefix}.")
        if (dependencies.aliases.get(weight, weight), outward) in residual
    ]
