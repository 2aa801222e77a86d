"""The oracle: a copy of the model whose chosen groups are zero and whose norms look past them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .families import GroupFamily, Removal
from .state import Dim, Trace

if TYPE_CHECKING:
    from .dependency_map import DependencyMap


@dataclass(frozen=True, eq=False)
class NormIndex:
    """Positions of a norm's last dimension that belong to each group: ``index [size, k]``."""

    module: str
    family: str
    width: int
    index: np.ndarray


def norm_indices(
    trace: Trace, families: Sequence[GroupFamily], labels: Mapping[str, Sequence[Dim]]
) -> list[NormIndex]:
    """Which norm averages over which family's own channels."""
    events = [e for e in trace.events if e.role == "normed"]
    if not events:
        return []
    sources = _group_of_leaf(trace, families, labels)
    found: dict[tuple[str, str], NormIndex] = {}
    for event in events:
        row, leaf, _, _ = trace.store.leaves(event.labels)
        for name, (leaves, groups, size) in sources.items():
            at = np.searchsorted(leaves, leaf)
            at[at == len(leaves)] = 0
            hit = leaves[at] == leaf
            if not hit.any() or (event.module, name) in found:
                continue
            group, rows = groups[at[hit]], row[hit]
            order = np.lexsort((rows, group))
            if len(rows) % size == 0:
                table = rows[order].reshape(size, -1)
                found[event.module, name] = NormIndex(event.module, name, len(event.labels), table)
    return list(found.values())


def _group_of_leaf(trace, families, labels):
    """Per family: its leaf classes (sorted), the group of each, and the number of groups."""
    sources = {}
    for family in families:
        if family.partition is not None:
            continue
        first = family.slices[0]
        terms = labels[first.parameter][first.dim]
        # A leaf of the family is one that all rows of a group share and no other group has.
        row, leaf, _, _ = trace.store.leaves(terms)
        owner = np.full(len(terms), -1, dtype=np.int64)
        owner[first.index.ravel()] = np.repeat(np.arange(family.size), first.index.shape[1])
        keep = owner[row] >= 0
        pairs = np.unique(np.stack([leaf[keep], owner[row][keep]], axis=1), axis=0)
        leaves, count = np.unique(pairs[:, 0], return_counts=True)
        own = np.isin(pairs[:, 0], leaves[count == 1])
        candidates = pairs[own]
        total = np.bincount(row[keep], minlength=1)
        del total
        per_group = first.index.shape[1]
        hits = {}
        for lf, ow in zip(leaf[keep].tolist(), owner[row][keep].tolist(), strict=True):
            hits[lf, ow] = hits.get((lf, ow), 0) + 1
        whole = [(lf, ow) for lf, ow in candidates.tolist() if hits[lf, ow] == per_group]
        if whole:
            table = np.array(sorted(whole), dtype=np.int64)
            sources[family.name] = (table[:, 0], table[:, 1], family.size)
    return sources


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
                module.normalized_shape = (len(kept),)

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        out = self.norm(hidden[..., self.kept], *args, **kwargs)
        full = out.new_zeros(*out.shape[:-1], self.width)
        full[..., self.kept] = out
        return full


def zero_groups(dependencies: DependencyMap, model: nn.Module, removal: Removal) -> nn.Module:
    """See :meth:`DependencyMap.zero`."""
    zeroed = copy.deepcopy(model)
    tensors = dict(zeroed.named_parameters())
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
