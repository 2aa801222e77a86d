"""Which modules of a layer read what a plan removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pruner_lib.readers.matrices import as_matrix, matrices

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan


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


def readers_of(layer: nn.Module, prefix: str, plan: PruningPlan) -> list[Reader]:
    """Linear modules of a dense layer whose input loses channels.

    A weight that several modules share is left out: fitting it for one would change the others.
    """
    found = []
    shared = set(plan.dependencies.aliases.values())
    for path, weight, inward, outward in matrices(layer, f"{prefix}."):
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
    inward = {weight: dim for _, weight, dim, _ in matrices(model, "")}
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
