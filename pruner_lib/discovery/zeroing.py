"""The oracle: a copy of the model whose chosen groups are zero and whose norms look past them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .families import CoupledSlice, Removal, group_numbers
from .grouping import Grouping, pair_keys, siblings
from .state import Event, Trace

if TYPE_CHECKING:
    from .dependency_map import DependencyMap

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class NormIndex:
    """Where an operator averages over, or chooses among, the groups of a family.

    Attributes:
        module: the module whose code calls the operator.
        family: name of the family.
        width: size of the dimension.
        index: positions in the dimension that belong to each group, ``[size, k]``.
        axis: the dimension, counted from the end.
        competes: the positions compete (a router's softmax, top-k) instead of being averaged.
    """

    module: str
    family: str
    width: int
    index: np.ndarray
    axis: int = -1
    competes: bool = False


def norm_indices(trace: Trace, grouping: Grouping) -> list[NormIndex]:
    """Which norm averages over which family's own channels, which router chooses among its experts."""
    events: dict[tuple[str, str, int, int], Event] = {}
    for event in trace.events:
        if event.role in ("normed", "competed"):
            events.setdefault((event.module, event.role, event.axis, len(event.labels)), event)
    if not events:
        return []
    sizes = [len(event.labels) for event in events.values()]
    rows, leaves, paths, _ = trace.store.leaves(np.concatenate([event.labels for event in events.values()]))
    order = np.argsort(rows, kind="stable")
    rows, leaves, paths = rows[order], leaves[order], paths[order]
    found = []
    for event, size, end in zip(events.values(), sizes, np.cumsum(sizes), strict=True):
        here = slice(*np.searchsorted(rows, (end - size, end)))
        found += _of_event(event, grouping, rows[here] - (end - size), leaves[here], paths[here])
    return found


def _of_event(
    event: Event, grouping: Grouping, row: np.ndarray, leaf: np.ndarray, path: np.ndarray
) -> list[NormIndex]:
    found = []
    for number in np.unique(grouping.family_of[leaf]):
        mine = grouping.family_of[leaf] == number
        if number < 0 or mine.sum() % grouping.families[number].size:
            continue
        family = grouping.families[number]
        names = leaf[mine].astype(np.int64)
        if family.partition is not None:
            names = pair_keys(siblings(row, path, leaf, row[mine], path[mine]), leaf[mine])
        classes, groups = grouping.group_of[int(number)]
        at = np.minimum(np.searchsorted(classes, names), len(classes) - 1)
        if (classes[at] != names).any():
            continue  # a norm over bare slots: the family is blocked there
        table = row[mine][np.lexsort((row[mine], groups[at]))].reshape(family.size, -1)
        competes = event.role == "competed"
        found.append(NormIndex(event.module, family.name, len(event.labels), table, event.axis, competes))
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

    def __getattr__(self, name: str) -> Any:
        """What other code reads off the norm: ``weight.dtype``, ``eps``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("norm"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.norm(hidden[..., self.kept], *args, **kwargs)
        full = out.new_zeros(*out.shape[:-1], self.width)
        full[..., self.kept] = out
        return full


class OverKept(TorchDispatchMode):
    """While it is on, averages, softmax and top-k over one dimension see only the kept positions.

    For a norm or a choice that is written inside a larger module, and so cannot be replaced alone.
    """

    def __init__(self, kept: torch.Tensor, width: int, axis: int, competes: bool) -> None:
        super().__init__()
        self.kept, self.width, self.axis, self.competes = kept, width, axis, competes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or x.dim() < -self.axis or x.shape[self.axis] != self.width:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        kept = self.kept.to(x.device)
        if self.competes and packet in (aten._softmax, aten._safe_softmax, aten._log_softmax, aten.topk):
            gone = torch.ones(self.width, dtype=torch.bool, device=x.device).index_fill(0, kept, False)
            masked = x.transpose(self.axis, -1).masked_fill(gone, -torch.inf).transpose(self.axis, -1)
            return func(masked, *args[1:], **kwargs)
        if not self.competes and packet in (
            aten.mean,
            aten.var,
            aten.std,
            aten.var_mean,
            aten.std_mean,
            aten.linalg_vector_norm,
            aten.norm,
        ):
            return func(x.index_select(self.axis, kept), *args[1:], **kwargs)
        if not self.competes and packet in (aten.native_layer_norm, aten._fused_rms_norm):
            part = [a[..., kept] if isinstance(a, torch.Tensor) else a for a in args]
            part[1] = [len(kept)]
            out, *rest = func(*part, **kwargs)
            return torch.zeros_like(x).index_copy_(-1, kept, out), *rest
        return func(*args, **kwargs)


class _ForwardOverKept:
    """A module's own forward under :class:`OverKept`, whose arguments are ``mode``."""

    def __init__(self, forward: Callable[..., Any], *mode: Any) -> None:
        self.forward, self.mode = forward, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with OverKept(*self.mode):
            return self.forward(*args, **kwargs)


def _is_plain_norm(module: nn.Module, width: int) -> bool:
    """A module of its own with nothing but vectors over the dimension: LayerNorm, RMSNorm."""
    vectors = all(p.dim() == 1 and len(p) == width for p in module.parameters())
    return vectors and next(module.children(), None) is None


def zero_groups(dependencies: DependencyMap, model: nn.Module, removal: Removal) -> nn.Module:
    """See :meth:`DependencyMap.zero`."""
    zeroed = copy.deepcopy(model)
    tensors: dict[str, torch.Tensor] = dict(zeroed.named_parameters())
    tensors.update((n, b) for n, b in zeroed.named_buffers() if n in zeroed.state_dict(keep_vars=True))
    removed: dict[tuple[str, int, int, bool], np.ndarray] = {}
    with torch.no_grad():
        for name, groups in removal.items():
            family = dependencies.family(name)
            groups = group_numbers(family, groups)
            if not groups:
                continue
            for piece in family.slices:
                if piece.parameter in tensors:
                    index = torch.from_numpy(piece.of(groups)).to(tensors[piece.parameter].device)
                    tensors[piece.parameter].index_fill_(piece.dim, index, 0)
            for norm in dependencies.norms:
                if norm.family == name:
                    gone = norm.index[np.asarray(groups, dtype=np.int64)].ravel()
                    place = (norm.module, norm.axis, norm.width, norm.competes)
                    removed[place] = np.union1d(removed.get(place, gone), gone)
    for (path, axis, width, competes), gone in removed.items():
        parent, _, leaf = path.rpartition(".")
        module = zeroed.get_submodule(path)
        kept = torch.from_numpy(np.setdiff1d(np.arange(width), gone))
        if not competes and _is_plain_norm(module, width):
            setattr(zeroed.get_submodule(parent), leaf, NormOverKept(module, kept, width))
        else:
            vars(module)["forward"] = _ForwardOverKept(module.forward, kept, width, axis, competes)
    return zeroed


@contextmanager
def zeroed_in_place(
    tensors: Mapping[str, torch.Tensor], pieces: Iterable[tuple[CoupledSlice, Sequence[int]]]
) -> Iterator[None]:
    """Zero groups in the model itself, and put them back bit for bit on the way out.

    Args:
        tensors: the model's parameters and buffers by name, tied ones under each of theirs.
        pieces: slices, each with the groups of it to zero.
    """
    saved: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        try:
            for piece, groups in pieces:
                tensor = tensors[piece.parameter]
                index = torch.from_numpy(piece.of(groups)).to(tensor.device)
                saved.append((tensor, piece.dim, index, tensor.index_select(piece.dim, index)))
                tensor.index_fill_(piece.dim, index, 0)
            yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)
