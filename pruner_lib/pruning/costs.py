"""What a plan will leave: parameters, bytes, multiply-accumulates and KV cache, exact and at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pruner_lib.discovery.tracing import meta_copy
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.products import Axis, Product, trace_products

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

_MEMO = "_cost_terms"


@dataclass(frozen=True)
class Cost:
    """Size and work of one forward pass: what ``count_cost`` counts, and what a plan says it will leave.

    Attributes:
        params: parameters; a tied one counts once.
        macs: multiply-accumulates of a forward pass at ``batch_size`` × ``seq_len`` tokens.
        weight_bytes: bytes of the parameters in the dtype they are in.
        kv_cache_bytes_per_token: what the KV cache grows by per token of one sequence; None for a
            model that keeps no such cache.
        batch_size: sequences of the counted pass.
        seq_len: tokens of each.
    """

    params: int
    macs: int
    weight_bytes: int
    kv_cache_bytes_per_token: int | None
    batch_size: int = 1
    seq_len: int = 64

    def __str__(self) -> str:
        cache = self.kv_cache_bytes_per_token
        return (
            f"{self.params / 1e6:,.2f} M parameters, {self.macs / 1e9:,.2f} G multiply-accumulates at "
            f"{self.batch_size} × {self.seq_len} tokens, {self.weight_bytes / 2**20:,.1f} MiB of weights, "
            f"{'no KV cache' if cache is None else f'{cache:,} bytes of KV cache per token'}"
        )


class CostSum:
    """A sum of products of kept sizes, evaluated for one removal after another.

    Example: ``q_proj.weight`` of 2 heads × 3 channels and 8 hidden channels counts ``(6 - 3a) · (8 - b)``
    parameters after a heads and b hidden channels went.
    """

    def __init__(self, products: Iterable[Product]) -> None:
        products = list(products)
        axes: dict[int, tuple[int, Axis]] = {}
        for product in products:
            for axis in product.axes:
                axes.setdefault(id(axis), (len(axes), axis))
        self._axes = [axis for _, axis in axes.values()]
        self._places = [product.place for product in products]
        self._coefficients = np.array([product.coefficient for product in products], dtype=np.int64)
        width = max((len(product.axes) for product in products), default=0)
        # The last column of sizes is 1, for products of fewer axes.
        self._index = np.full((len(products), width), len(self._axes), dtype=np.int64)
        for row, product in enumerate(products):
            self._index[row, : len(product.axes)] = [axes[id(axis)][0] for axis in product.axes]

    def __len__(self) -> int:
        return len(self._places)

    def terms(self, removal: Mapping[str, Any]) -> np.ndarray:
        """The value of each product after a removal (family name to group indices)."""
        sizes = np.ones(len(self._axes) + 1, dtype=np.int64)
        sizes[:-1] = [axis.kept(removal) for axis in self._axes]
        return self._coefficients * np.prod(sizes[self._index], axis=1)

    def within(self, paths: Collection[str]) -> np.ndarray:
        """Which products lie in one of the modules."""
        inside = tuple(f"{path}." for path in paths)
        return np.array([f"{place}.".startswith(inside) for place in self._places], dtype=bool)

    def __call__(self, removal: Mapping[str, Any], dropped: Collection[str] = ()) -> int:
        """The sum after a removal and without the modules at ``dropped``."""
        values = self.terms(removal)
        return int(values[~self.within(dropped)].sum() if dropped else values.sum())


class CostTerms:
    """All sums of one model. Parameters and bytes come from the map; the rest is traced when asked for."""

    def __init__(self, dependencies: DependencyMap) -> None:
        self._dependencies = dependencies
        self._traced: dict[tuple[int, int], tuple[CostSum, CostSum]] = {}

    @cached_property
    def params(self) -> CostSum:
        """Parameters, one product of dimensions each."""
        return CostSum(_parameters(self._dependencies, {}))

    @cached_property
    def weight_bytes(self) -> CostSum:
        """Bytes of the parameters."""
        model = self._model("bytes")
        sizes = {name: parameter.element_size() for name, parameter in model.named_parameters()}
        return CostSum(_parameters(self._dependencies, sizes))

    def macs(self, batch_size: int, seq_len: int) -> CostSum:
        """Multiply-accumulates of one forward pass."""
        return self._pass(batch_size, seq_len)[0]

    def cache(self, batch_size: int, seq_len: int) -> CostSum:
        """Bytes of KV cache per token."""
        return self._pass(batch_size, seq_len)[1]

    def _pass(self, batch_size: int, seq_len: int) -> tuple[CostSum, CostSum]:
        key = batch_size, seq_len
        if key not in self._traced:
            skeleton = meta_copy(self._model("multiply-accumulates"))
            macs, cache = trace_products(skeleton, batch_size=batch_size, seq_len=seq_len)
            self._traced[key] = CostSum(macs), CostSum(cache)
        return self._traced[key]

    def _model(self, what: str) -> Any:
        model = self._dependencies._model
        if model is None:
            raise PruningError(
                f"this map was written by hand and holds no model, so {what} are unknown; use discover(model)"
            )
        return model

    def planned(
        self, removal: Mapping[str, Any], dropped: Collection[str], *, batch_size: int, seq_len: int
    ) -> Cost:
        """The cost after a removal and without the modules at ``dropped``."""
        for label, value in (("batch_size", batch_size), ("seq_len", seq_len)):
            if value < 1:
                raise ValueError(f"{label} must be at least 1, not {value}")
        cache = self.cache(batch_size, seq_len)
        return Cost(
            params=self.params(removal, dropped),
            macs=self.macs(batch_size, seq_len)(removal, dropped),
            weight_bytes=self.weight_bytes(removal, dropped),
            kv_cache_bytes_per_token=cache(removal, dropped) if len(cache) else None,
            batch_size=batch_size,
            seq_len=seq_len,
        )


def cost_terms(dependencies: DependencyMap) -> CostTerms:
    """The sums of a model, made once per map and kept with it."""
    memo = vars(dependencies)
    if _MEMO not in memo:
        memo[_MEMO] = CostTerms(dependencies)
    return memo[_MEMO]


def _parameters(dependencies: DependencyMap, element_size: Mapping[str, int]) -> list[Product]:
    """One product per parameter: bytes of an element times its dimensions."""
    tables: dict[tuple[str, int], dict[str, list[np.ndarray]]] = {}
    for family in dependencies.families:
        if family.blocked is None:
            for piece in family.slices:
                place = dependencies.aliases.get(piece.parameter, piece.parameter), piece.dim
                rows = piece.index.reshape(family.size, -1)
                tables.setdefault(place, {}).setdefault(family.name, []).append(rows)
    known: dict[Any, Axis] = {}
    products = []
    for name, shape in dependencies.shapes.items():
        if name in dependencies.aliases or name in dependencies.buffers:
            continue
        axes = []
        for dim, size in enumerate(shape):
            found = tables.get((name, dim))
            if found:
                joined = {family: np.concatenate(rows, axis=1) for family, rows in found.items()}
                axes.append(_shared(Axis(size, joined), known))
        rest = [size for dim, size in enumerate(shape) if (name, dim) not in tables]
        products.append(Product(element_size.get(name, 1) * math.prod(rest), tuple(axes), name))
    return products


def _shared(axis: Axis, known: dict[Any, Axis]) -> Axis:
    """One object for all dimensions that shrink alike."""
    key = axis.size, *((name, table.tobytes()) for name, table in axis.tables.items())
    return known.setdefault(key, axis)


__all__ = ["Cost", "CostSum", "CostTerms", "cost_terms"]
