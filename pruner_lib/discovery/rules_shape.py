"""Rules of the operators that move indices: views, slices, concatenation, expansion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .state import ANY, Dim, Mark, Trace

aten = torch.ops.aten


def _merge(trace: Trace, left: Dim, left_size: int, right: Dim, right_size: int) -> Dim:
    """Labels of the dimension that merges two (row-major)."""
    if left_size == 1:
        return right
    if right_size == 1:
        return left
    if isinstance(left, Mark) and isinstance(right, np.ndarray):
        left = trace.store.fresh(left_size)
    if isinstance(right, Mark) and isinstance(left, np.ndarray):
        right = trace.store.fresh(right_size)
    if isinstance(left, np.ndarray):
        return trace.store.pair(left, right) if isinstance(right, np.ndarray) else np.repeat(left, right_size)
    if isinstance(right, np.ndarray):
        return np.tile(right, left_size)
    return None if left is None or right is None else ANY


def _split(trace: Trace, dim: Dim, left: int, right: int) -> tuple[Dim, Dim]:
    """Labels of the two dimensions (left, right) that one is split into."""
    if not isinstance(dim, np.ndarray):
        return dim, dim
    if left == 1:
        return None, dim
    if right == 1:
        return dim, None
    grid = trace.store.find(dim).reshape(left, right)
    if (grid == grid[:, :1]).all():
        return dim.reshape(left, right)[:, 0], None
    if (grid == grid[:1]).all():
        return None, dim.reshape(left, right)[0]
    outer, inner = trace.store.fresh(left), trace.store.fresh(right)
    trace.equate(dim, trace.store.pair(outer, inner))
    return outer, inner


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair up runs of old and new dimensions (sizes above 1) whose products agree."""
    olds = [i for i, n in enumerate(old) if n != 1]
    news = [i for i, n in enumerate(new) if n != 1]
    blocks = []
    i = j = 0
    while i < len(olds) and j < len(news):
        left, right = [olds[i]], [news[j]]
        a, b = old[olds[i]], new[news[j]]
        while a != b:
            if a < b:
                i += 1
                left.append(olds[i])
                a *= old[olds[i]]
            else:
                j += 1
                right.append(news[j])
                b *= new[news[j]]
        blocks.append((left, right))
        i, j = i + 1, j + 1
    return blocks


def view(trace: Trace, dims: Sequence[Dim], old: Sequence[int], new: Sequence[int]) -> list[Dim]:
    """Labels after a reshape from ``old`` to ``new`` sizes."""
    out: list[Dim] = [None] * len(new)
    for left, right in _blocks(old, new):
        if len(left) == len(right) == 1:
            out[right[0]] = dims[left[0]]
            continue
        merged, size = dims[left[0]], old[left[0]]
        for k in left[1:]:
            merged = _merge(trace, merged, size, dims[k], old[k])
            size *= old[k]
        # Split from the right, so that n = a·b·c becomes ⟨⟨a, b⟩, c⟩ as merging makes it.
        for k in reversed(right[1:]):
            size //= new[k]
            merged, out[k] = _split(trace, merged, size, new[k])
        out[right[0]] = merged
    return out


def rule_view(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return view(trace, trace.dims(args[0]), args[0].shape, out.shape)


def rule_permute(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = trace.dims(args[0])
    rank = len(dims)
    if func.overloadpacket is aten.t:
        order = list(range(rank))[::-1]
    elif func.overloadpacket is aten.transpose:
        order = list(range(rank))
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = order[b], order[a]
    else:
        order = [k % rank for k in args[1]]
    return [dims[k] for k in order]


def rule_unsqueeze(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = list(trace.dims(args[0]))
    dims.insert(args[1] % (len(dims) + 1), None)
    return dims


def rule_squeeze(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return view(trace, trace.dims(args[0]), args[0].shape, out.shape)


def rule_expand(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims, shape = trace.dims(args[0]), args[0].shape
    lead = out.dim() - len(dims)
    learned = trace.info(args[0]).learned
    result: list[Dim] = []
    for k, size in enumerate(out.shape):
        if k >= lead and shape[k - lead] == size:
            result.append(dims[k - lead])
        else:
            # Copies are alike, so each may go on its own: fresh labels (query heads of one KV head).
            result.append(trace.store.fresh(size) if learned and size > 1 else None)
    return result


def rule_slice(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = list(trace.dims(args[0]))
    dim = (args[1] if len(args) > 1 else 0) % len(dims)
    piece = dims[dim]
    if isinstance(piece, np.ndarray):
        start, end = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
        step = args[4] if len(args) > 4 else 1
        dims[dim] = piece[slice(start, end, step)]
        _lone(trace, dims[dim], len(piece))
    return dims


def rule_narrow_many(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """split, split_with_sizes, chunk: consecutive pieces of one dimension."""
    dims = trace.dims(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(dims)
    results, start = [], 0
    for piece in out:
        size = piece.shape[dim]
        one = list(dims)
        whole = dims[dim]
        if isinstance(whole, np.ndarray):
            one[dim] = whole[start : start + size]
            _lone(trace, one[dim], len(whole))
        start += size
        results.append(one)
    return results


def _selected(trace: Trace, dim: Dim) -> None:
    trace.block(dim, f"indices picked one by one in the code ({trace.where()})")


def _lone(trace: Trace, piece: Dim, whole: int) -> None:
    """A slice of one index drops its label with the dimension; the code means just that index."""
    if isinstance(piece, np.ndarray) and len(piece) == 1 < whole:
        _selected(trace, piece)


def rule_select(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = list(trace.dims(args[0]))
    _selected(trace, dims.pop(args[1] % (len(dims))))
    return dims


def rule_unbind(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = list(trace.dims(args[0]))
    _selected(trace, dims.pop((args[1] if len(args) > 1 else 0) % len(dims)))
    return [list(dims) for _ in out]


def rule_cat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    tensors = [t for t in args[0] if t.numel() or t.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    result: list[Dim] = []
    for k in range(out.dim()):
        parts = [trace.dims(t)[k] for t in tensors]
        if k != dim:
            result.append(trace.unify(parts, "joined with"))
        elif any(isinstance(part, np.ndarray) for part in parts):
            result.append(_joined(trace, parts, [t.shape[k] for t in tensors]))
        else:
            result.append(None if any(part is None for part in parts) else ANY)
    return result


def _joined(trace: Trace, parts: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    arrays = []
    for part, size in zip(parts, sizes, strict=True):
        if isinstance(part, np.ndarray):
            arrays.append(part)
        else:
            filler = trace.store.fresh(size)
            if part is None and size > 1:
                trace.block(filler, f"a constant joined to it ({trace.where()})")
            arrays.append(filler)
    return np.concatenate(arrays)


def rule_stack(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    dims = [trace.unify([trace.dims(t)[k] for t in tensors], "stacked with") for k in range(tensors[0].dim())]
    dims.insert(dim, None)
    return dims


def rule_repeat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims, shape = list(trace.dims(args[0])), list(args[0].shape)
    lead = out.dim() - len(dims)
    dims, shape = [None] * lead + dims, [1] * lead + shape
    result: list[Dim] = []
    for dim, old, new in zip(dims, shape, out.shape, strict=True):
        times = trace.store.fresh(new // old) if trace.info(args[0]).learned and old and new > old else None
        result.append(dim if old == new else _merge(trace, times, new // old, dim, old))
    return result


def rule_unfoldable(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """roll, flip: every index moves, so the dimension keeps no meaning."""
    dims = list(trace.dims(args[0]))
    moved = args[1] if func.overloadpacket is aten.flip else args[2]
    for k in moved:
        trace.block(dims[k % len(dims)], f"its indices are moved by a fixed amount ({trace.where()})")
    return dims


def rule_as_complex(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Two numbers become one: what turns them turns both, so they stay together."""
    *rest, parts = trace.dims(args[0])
    if isinstance(parts, np.ndarray):
        trace.equate(parts[:1], parts[1:])
        trace.block(parts, f"the real and the imaginary part of one number ({trace.where()})")
    return rest


def rule_as_real(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return [*trace.dims(args[0]), None]


RULES = {
    aten.view_as_complex: rule_as_complex,
    aten.view_as_real: rule_as_real,
    aten.view: rule_view,
    aten._unsafe_view: rule_view,
    aten.reshape: rule_view,
    aten._reshape_alias: rule_view,
    aten.t: rule_permute,
    aten.transpose: rule_permute,
    aten.permute: rule_permute,
    aten.unsqueeze: rule_unsqueeze,
    aten.squeeze: rule_squeeze,
    aten.expand: rule_expand,
    aten.slice: rule_slice,
    aten.split: rule_narrow_many,
    aten.split_with_sizes: rule_narrow_many,
    aten.chunk: rule_narrow_many,
    aten.select: rule_select,
    aten.unbind: rule_unbind,
    aten.cat: rule_cat,
    aten.stack: rule_stack,
    aten.repeat: rule_repeat,
    aten.roll: rule_unfoldable,
    aten.flip: rule_unfoldable,
}
