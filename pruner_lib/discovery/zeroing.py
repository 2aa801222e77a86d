"""The oracle: a copy of the model whose chosen groups are zero and whose norms look past them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .families import Removal
from .grouping import Grouping, pair_keys, siblings
from .state import Trace

if TYPE_CHECKING:
    from .dependency_map import DependencyMap


@dataclass(frozen=True, eq=False)
class NormIndex:
    """Positions of a norm's last dimension that belong to each group: ``index [size, k]``."""

    module: str
    family: str
    width: int
    index: np.ndarray


def norm_indices(trace: Trace, grouping: Grouping) -> list[NormIndex]:
    """Which norm averages over which family's own channels."""
    events = {event.module: event for event in reversed(trace.events) if event.role == "normed"}
    if not events:
        return []
    sizes = [len(event.labels) for event in events.values()]
    rows, leaves, paths, _ = trace.store.leaves(np.concatenate([event.labels for event in events.values()]))
    order = np.argsort(rows, kind="stable")
    rows, leaves, paths = rows[order], leaves[order], paths[order]
    ends = np.cumsum(sizes)
    found = []
    for module, size, end in zip(events, sizes, ends, strict=True):
        here = slice(*np.searchsorted(rows, (end - size, end)))
        row, leaf, path = rows[here] - (end - size), leaves[here], paths[here]
        for number in np.unique(grouping.family_of[leaf]):
            mine = grouping.family_of[leaf] == number
            if number < 0 or mine.sum() % grouping.families[number].size:
                continue
            names = leaf[mine].astype(np.int64)
            if grouping.families[number].partition is not None:
                names = pair_keys(siblings(row, path, leaf, row[mine], path[mine]), leaf[mine])
            classes, groups = grouping.group_of[int(number)]
            at = np.minimum(np.searchsorted(classes, names), len(classes) - 1)
            if (classes[at] != names).any():
                continue  # a norm over bare slots: the family is blocked there
            table = row[mine][np.lexsort((row[mine], groups[at]))]
            family = grouping.families[number]
            found.append(NormIndex(module, family.name, size, table.reshape(family.size, -1)))
    return found


class NormOverKept(nn.Module):
    """A norm that sees only the kept channels and leaves zeros at the others."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor, width: int) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        self.kept = kept
        self.width = width
        for module in self.norm.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() and parameter.shape[-1] == width:
                    cut = nn.Parameter(parameter.detach()[..., kept].clone(), parameter.requires_grad)
                    setattr(module, name, cut)
            if getattr(module, "normalized_shape", None) == (width,):
                vars(module)["normalized_shape"] = (len(kept),)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.norm(hidden[..., self.kept], *args, **kwargs)
        full = out.new_zeros(*out.shape[:-1], self.width)
        full[..., self.kept] = out
        return full


def zero_groups(dependencies: DependencyMap, model: nn.Module, removal: Removal) -> nn.Module:
    """See :meth:`DependencyMap.zero`."""
    zeroed = copy.deepcopy(model)
    tensors: dict[str, torch.Tensor] = dict(zeroed.named_parameters())
    tensors.update((n, b) for n, b in zeroed.named_buffers() if n in zeroed.state_dict(keep_vars=True))
    removed: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, groups in removal.items():
            family = dependencies.family(name)
            if not len(groups):
                continue
            for piece in family.slices:
                if piece.parameter in tensors:
                    index = torch.from_numpy(piece.of(groups)).to(tensors[piece.parameter].device)
                    tensors[piece.parameter].index_fill_(piece.dim, index, 0)
            for norm in dependencies.norms:
                if norm.family == name:
                    gone = norm.index[np.asarray(groups, dtype=np.int64)].ravel()
                    removed[norm.module] = np.union1d(removed.get(norm.module, gone), gone)
    widths = {norm.module: norm.width for norm in dependencies.norms}
    for path, gone in removed.items():
        parent, _, leaf = path.rpartition(".")
        holder = zeroed.get_submodule(parent)
        kept = torch.from_numpy(np.setdiff1d(np.arange(widths[path]), gone))
        setattr(holder, leaf, NormOverKept(getattr(holder, leaf), kept, widths[path]))
    return zeroed
