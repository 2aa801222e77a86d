"""Widths of experts that torch's grouped product cannot run, said before the first forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan

_ROW_BYTES = 16  # a row of each factor must be a multiple of this
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others it takes at no width, cut or not


def warn_of_expert_widths(model: nn.Module, plan: PruningPlan) -> None:
    """Warn once where a plan leaves experts that run in torch's grouped product, but not at their new width.

    The cut is right, and the eager loop over experts runs it, so it is not refused.

    Args:
        model: the dense one; the cut one runs its experts in the same way.
        plan: what is cut from it.
    """
    widths: set[int] = set()
    kinds: dict[str, int] = {}
    dtypes: set[str] = set()
    shapes = plan.new_shapes()
    for parameter, weight, dims in _grouped_weights(model):
        align = _ROW_BYTES // weight.element_size()
        for dim in dims & plan.removed_indices(parameter).keys():
            if parameter in shapes and shapes[parameter][dim] % align:  # not in a dropped layer
                widths.add(shapes[parameter][dim])
                kinds |= dict.fromkeys(_kinds_cutting(plan, parameter, dim), align)
                dtypes.add(str(weight.dtype).removeprefix("torch."))
    if widths:
        warnings.warn(
            f"the experts of the cut model are {_listed(widths)} wide, which torch's grouped matrix product "
            f"cannot run in {' and '.join(sorted(dtypes))}: it wants rows of a multiple of {_ROW_BYTES} "
            f"bytes, and the forward pass will raise. Plan again with round_to={kinds}, or run the experts "
            'one by one: load the model with experts_implementation="eager", or call '
            'set_experts_implementation("eager") on this one',
            stacklevel=3,
        )


def _grouped_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, set[int]]]:
    """Stacked experts that run in the grouped product: name, weight, and dimensions that are rows in it.

    transformers notes on each module that can run its experts so how their weights lie, and in its
    configuration how they run. A row of the inputs is as wide as the dimension that is summed over.
    """
    for path, module in model.named_modules():
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen != "grouped_mm" or not hasattr(module, "is_transposed"):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and weight.dtype in _DTYPES:
                yield f"{path}.{name}", weight, {2, 1 if module.is_transposed else 2}


def _kinds_cutting(plan: PruningPlan, parameter: str, dim: int) -> Iterator[str]:
    """Kinds of the families that a plan cuts from one dimension of a parameter."""
    name = plan.dependencies.aliases.get(parameter, parameter)
    for family in map(plan.dependencies.family, plan.removal):
        if any((piece.parameter, piece.dim) == (name, dim) for piece in family.slices):
            yield family.kind


def _listed(widths: set[int]) -> str:
    shown = [str(width) for width in sorted(widths)]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
