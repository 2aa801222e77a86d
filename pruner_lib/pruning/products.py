"""Every matrix product of a forward pass, with the family behind each of its dimensions.

A product (m × k)(k × n) costs m·k·n multiply-accumulates. Run once with numbers for the sizes and once
with labels, the model tells which of m, k and n shrink when groups of a family go; so the cost of any
plan is a sum of products of kept sizes, exact and without building the smaller model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruner_lib.discovery.grouping import Grouping, build_families, pair_keys, siblings
from pruner_lib.discovery.state import Trace
from pruner_lib.discovery.tracing import SEQUENCE, module_paths, run
from pruner_lib.pruning.errors import PruningError

aten = torch.ops.aten
Factor = tuple[torch.Tensor, int]  # a tensor and one of its dimensions
Formula = Callable[[Any, Any], list[list[Factor]]]


@dataclass(frozen=True, eq=False)
class Axis:
    """A dimension and the groups behind it.

    With two heads of three channels: ``size=6, tables={"layers.0.attention_head": [[0, 1, 2], [3, 4, 5]]}``.

    Attributes:
        size: indices of the dense model.
        tables: family name to the positions ``[groups, k]`` that go with each group.
    """

    size: int
    tables: Mapping[str, np.ndarray]

    def kept(self, removal: Mapping[str, Any]) -> int:
        """Indices left after a removal (family name to group indices)."""
        touched = [name for name in self.tables if len(removal.get(name, ()))]
        if not touched:
            return self.size
        if len(touched) == 1:
            return self.size - self.tables[touched[0]].shape[1] * len(removal[touched[0]])
        gone = np.zeros(self.size, dtype=bool)
        for name in touched:
            gone[self.tables[name][np.asarray(removal[name], dtype=np.int64)]] = True
        return self.size - int(gone.sum())


@dataclass(frozen=True, eq=False)
class Product:
    """One term of a cost: ``coefficient`` times the kept sizes of ``axes``.

    Attributes:
        coefficient: what no plan changes: tokens, bytes of an element, dimensions that are never cut.
        axes: the dimensions that may shrink.
        place: the parameter that is counted, or the module that runs the product.
    """

    coefficient: int
    axes: tuple[Axis, ...]
    place: str


def _rows(tensor: torch.Tensor, *dims: int) -> list[Factor]:
    return [(tensor, dim % tensor.ndim) for dim in dims]


def _matrix(first: int) -> Formula:
    def factors(args: Any, out: Any) -> list[list[Factor]]:
        left, right = args[first], args[first + 1]
        columns = _rows(right, -1) if right.ndim > 1 else []
        return [[*_rows(left, *range(left.ndim)), *columns]]

    return factors


def _attention(args: Any, out: Any) -> list[list[Factor]]:
    """Q·Kᵀ and A·V over all query heads: b·h·q·k·d_qk and b·h·q·k·d_v."""
    query, key, value = args[:3]
    square = [*_rows(query, *range(query.ndim - 1)), *_rows(key, -2)]
    return [[*square, *_rows(query, -1)], [*square, *_rows(value, -1)]]


def _convolution(args: Any, out: Any) -> list[list[Factor]]:
    signal, weight, transposed = args[0], args[1], args[6]
    elements = signal if transposed else out
    return [[*_rows(elements, *range(elements.ndim)), *_rows(weight, *range(1, weight.ndim))]]


def _grouped(args: Any, out: Any) -> list[list[Factor]]:
    """Rows sorted by expert meet one matrix each."""
    return [[*_rows(args[0], *range(args[0].ndim)), *_rows(args[1], -1)]]


def _formulas() -> dict[Any, Formula]:
    table: dict[str, Formula] = {name: _matrix(0) for name in ("mm", "bmm", "mv", "dot")}
    table |= {name: _matrix(1) for name in ("addmm", "baddbmm", "addmv")}
    table |= {"convolution": _convolution, "_grouped_mm": _grouped}
    kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    for kernel in (*kernels, "fused_attention_overrideable"):
        table[f"_scaled_dot_product_{kernel}"] = _attention
    return {getattr(aten, name): formula for name, formula in table.items() if hasattr(aten, name)}


FORMULAS = _formulas()


class _Sizes(TorchDispatchMode):
    """Multiply-accumulates of every product, in order, as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.macs += [math.prod(t.shape[dim] for t, dim in product) for product in formula(args, out)]
        return out


class _Watch(TorchDispatchMode):
    """The tensors of every product, and the module that ran it; discovery labels them meanwhile."""

    def __init__(self, place: Trace) -> None:
        super().__init__()
        self.place = place  # its ``module`` is the one that is running
        self.products: list[list[Factor]] = []
        self.places: list[str] = []
        self.makers: dict[int, str] = {}  # tensor to the module that made it; discovery keeps tensors alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, list | tuple) else (out,):
            self.makers[id(made)] = self.place.module
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            found = formula(args, out)
            self.products += found
            self.places += [self.place.module] * len(found)
        return out


def _labelled(trace: Trace, product: list[Factor]) -> list[np.ndarray]:
    found = [trace.dims(tensor)[dim] for tensor, dim in product]
    return [dim for dim in found if isinstance(dim, np.ndarray)]


def trace_products(
    model: nn.Module, *, batch_size: int, seq_len: int
) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
    """Multiply-accumulates of one forward pass, and elements of KV cache per token, as sums of products.

    Args:
        model: on the meta device, in evaluation mode.
        batch_size: sequences of the counted pass.
        seq_len: tokens of each.

    Returns:
        ``(macs, cache)``; ``cache`` holds bytes and is empty for a model that keeps no such cache.

    Raises:
        PruningError: the model cannot be run so, or runs other operators at this length.
    """
    failures: list[str] = []
    for way in _ways_to_call(model):
        try:
            sizes = _Sizes()
            cache = _run(model, way(batch_size, seq_len), sizes)
            traced = _traced(model, way(1, SEQUENCE))
        except Exception as error:  # the model's own code fails in its own way; the next call may do
            failures.append(f"{type(error).__name__}: {str(error)[:160]}")
            continue
        macs = _with_numbers(traced.products, traced.places, sizes.macs)
        tokens = batch_size * seq_len
        held = [tensor.numel() * tensor.element_size() // tokens for tensor in _cached(cache)]
        kept = _with_numbers(traced.cache, traced.holders, held)
        if macs is not None and kept is not None:
            return macs, kept
        failures.append("its operators differ with the length of the text")
    raise PruningError(
        f"the multiply-accumulates of {type(model).__name__} cannot be planned: {'; '.join(failures)}. "
        "Plan by parameters, cut, and count with count_cost"
    )


@dataclass(frozen=True, eq=False)
class _Traced:
    """A symbolic run: the axes of each product and of each cached tensor, and where they are."""

    products: list[tuple[Axis, ...]]
    places: list[str]
    cache: list[tuple[Axis, ...]]
    holders: list[str]


def _with_numbers(
    axes: list[tuple[Axis, ...]], places: list[str], numbers: list[int]
) -> tuple[Product, ...] | None:
    """Products that have these values in the dense model; None where no whole coefficient does it."""
    if len(axes) != len(numbers):
        return None
    whole = [math.prod(axis.size for axis in mine) for mine in axes]
    if any(number % size for number, size in zip(numbers, whole, strict=True)):
        return None
    rows = zip(numbers, whole, axes, places, strict=True)
    return tuple(Product(number // size, mine, place) for number, size, mine, place in rows)


class _Meaning:
    """Turns labelled dimensions into axes, after the grouping is known."""

    def __init__(self, trace: Trace, grouping: Grouping) -> None:
        self.trace, self.grouping = trace, grouping

    def axes(self, labels: list[list[np.ndarray]]) -> list[tuple[Axis, ...]]:
        """One tuple per product, of the dimensions that some cuttable family can shrink."""
        roots = [[self.trace.store.find(terms) for terms in dims] for dims in labels]
        distinct = {terms.tobytes(): terms for dims in roots for terms in dims}
        known = dict(zip(distinct, self._make(list(distinct.values())), strict=True))
        found = [[known[terms.tobytes()] for terms in dims] for dims in roots]
        return [tuple(axis for axis in dims if axis.tables) for dims in found]

    def _make(self, arrays: list[np.ndarray]) -> list[Axis]:
        if not arrays:
            return []
        row, leaf, path, _ = self.trace.store.leaves(np.concatenate(arrays))
        order = np.argsort(row, kind="stable")
        row, leaf, path = row[order], leaf[order], path[order]
        ends = np.cumsum([len(terms) for terms in arrays])
        made = []
        for terms, end in zip(arrays, ends, strict=True):
            start = end - len(terms)
            here = slice(*np.searchsorted(row, (start, end)))
            made.append(Axis(len(terms), self._tables(row[here] - start, leaf[here], path[here])))
        return made

    def _tables(self, row: np.ndarray, leaf: np.ndarray, path: np.ndarray) -> dict[str, np.ndarray]:
        """Family name to the positions that go with each of its groups; only families that may be cut."""
        tables = {}
        for number in np.unique(self.grouping.family_of[leaf]):
            family = self.grouping.families[number] if number >= 0 else None
            if family is None or family.blocked is not None:
                continue
            mine = self.grouping.family_of[leaf] == number
            names = leaf[mine].astype(np.int64)
            if family.partition is not None:
                names = pair_keys(siblings(row, path, leaf, row[mine], path[mine]), leaf[mine])
            classes, groups = self.grouping.group_of[int(number)]
            at = np.minimum(np.searchsorted(classes, names), len(classes) - 1)
            if (classes[at] != names).any() or mine.sum() % family.size:
                raise PruningError(f"an operator uses {family.name} in part; its cost follows no simple rule")
            order = np.lexsort((row[mine], groups[at]))
            tables[family.name] = row[mine][order].reshape(family.size, -1)
        return tables


def _traced(model: nn.Module, inputs: dict[str, Any]) -> _Traced:
    watch, outputs = _Watch(Trace()), []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with module_paths(watch.place, model), watch:
            trace, labels = run(model, inputs, remember=False)
    finally:
        handle.remove()
    grouping = build_families(trace, labels, model)
    held = _cached(getattr(outputs[-1], "past_key_values", None))
    products = [*watch.products, *(_rows(tensor, *range(tensor.ndim)) for tensor in held)]
    axes = _Meaning(trace, grouping).axes([_labelled(trace, product) for product in products])
    count = len(watch.products)
    return _Traced(axes[:count], watch.places, axes[count:], [watch.makers.get(id(t), "") for t in held])


def _run(model: nn.Module, inputs: dict[str, Any], mode: TorchDispatchMode) -> Any:
    """The cache of one forward pass under a mode, or None."""
    with torch.no_grad(), torch.device("meta"), mode:
        output = model(**inputs)
    return getattr(output, "past_key_values", None)


def _cached(cache: Any) -> list[torch.Tensor]:
    """Keys and values that a cache holds, layer by layer."""
    layers = getattr(cache, "layers", ())
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _ways_to_call(model: nn.Module) -> Iterator[Callable[[int, int], dict[str, Any]]]:
    """Inputs for a decoder without data-dependent branches, by batch size and length."""
    accepts = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def way(use_cache: bool, mask: str | None) -> Callable[[int, int], dict[str, Any]]:
        def inputs(batch: int, length: int) -> dict[str, Any]:
            ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
            given: dict[str, Any] = {"input_ids": ids}
            if mask == "square":
                given["attention_mask"] = torch.zeros((batch, 1, length, length), dtype=dtype, device="meta")
            elif mask == "flat":
                given["attention_mask"] = torch.ones_like(ids)
            if "position_ids" in accepts:
                given["position_ids"] = torch.zeros_like(ids)
            if "use_cache" in accepts or takes_any:
                given["use_cache"] = use_cache
            return given

        return inputs

    for use_cache in (True, False):
        for mask in ("square", "flat", None):
            if mask is None or "attention_mask" in accepts or takes_any:
                yield way(use_cache, mask)
