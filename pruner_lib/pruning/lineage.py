"""What the layers and groups of a model that was cut several times were in the dense model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pruner_lib.discovery.grouping import layer_list
from pruner_lib.discovery.units import depth_units, layer_of_unit
from pruner_lib.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap, GroupFamily

Place = tuple[str, int]
Rows = dict[Place, np.ndarray]  # indices of one group, by place


@dataclass(frozen=True, eq=False)
class Lineage:
    """Follows a model through cuts, by the indices that each of its parameters has kept.

    Names do not tell: with one KV head left its query heads are called ``attention_head``, and behind a
    dropped layer every layer has another number.

    Attributes:
        dense: the map of the model before the first cut.
        path: of the list of layers.
        layers: number in the dense model of each layer that is left.
        kept: indices in the dense model of what is left, for each dimension that was cut.
        dropped: layers and sublayers that went whole, by their names in the dense model.
    """

    dense: DependencyMap
    path: str
    layers: tuple[int, ...]
    kept: Mapping[Place, np.ndarray]
    dropped: tuple[str, ...] = ()

    @classmethod
    def of(cls, dense: DependencyMap) -> Lineage:
        """That of a model which nothing was cut from yet."""
        path = "" if dense._model is None else layer_list(dense._model)[0]
        return cls(dense, path, tuple(range(dense.num_layers)), {})

    def after(self, plan: PruningPlan) -> Lineage:
        """That of the model which is left once a plan for this one is carried out."""
        kept = dict(self.kept)
        for parameter in plan.parameters:
            name = self._dense_name(parameter)
            for dim, gone in plan.removed_indices(parameter).items():
                before = kept.get((name, dim), np.arange(plan.dependencies.shapes[parameter][dim]))
                kept[name, dim] = np.delete(before, gone)
        whole = {layer_of_unit(unit) for unit in plan.dropped if unit.count(".") == 1}
        layers = tuple(dense for layer, dense in enumerate(self.layers) if layer not in whole)
        names = {now: then for then, now in self.units(plan.dependencies).items()} if plan.dropped else {}
        dropped = (*self.dropped, *(names[unit] for unit in plan.dropped))
        return Lineage(self.dense, self.path, layers, kept, dropped)

    def total(self, kinds: Collection[str]) -> PruningPlan:
        """All cuts so far as one plan for the dense model.

        Args:
            kinds: of the families that were cut.
        """
        removal = {
            family.name: gone.tolist()
            for family in self.dense.families
            if family.kind in kinds and len(gone := self._gone(family))
        }
        return PruningPlan.from_removal(self.dense, removal, dropped=self.dropped)

    def families(self, now: DependencyMap) -> dict[str, GroupFamily]:
        """What is left of each family of the dense model, under its name there; one group is no family."""
        cut_at: dict[Place, list[GroupFamily]] = {}
        for dense in self.dense.families:
            for place in dict.fromkeys((piece.parameter, piece.dim) for piece in dense.slices):
                cut_at.setdefault(place, []).append(dense)
        found: dict[str, GroupFamily] = {}
        for family in now.families:
            first = self._in_dense(_rows(family, 0))
            for dense in cut_at.get(next(iter(first), ("", 0)), ()):
                if any(self._is_rest_of(dense, group, first) for group in _groups_with(dense, first)):
                    found[dense.name] = family
        return found

    def units(self, now: DependencyMap) -> dict[str, str]:
        """Units of depth that are left, by their names in the dense model."""
        return {
            f"layers.{self.layers[layer_of_unit(unit)]}{_inside(unit)}": unit for unit in depth_units(now)
        }

    def _gone(self, dense: GroupFamily) -> np.ndarray:
        """Groups of which nothing is left outside of what was dropped whole."""
        inside = self._inside_dropped
        pieces = [piece for piece in dense.slices if not (inside and piece.parameter.startswith(inside))]
        gone = np.full(dense.size, bool(pieces))
        for piece in pieces:
            kept = self.kept.get((piece.parameter, piece.dim))
            if kept is None:
                return np.zeros(0, dtype=np.int64)
            gone &= ~np.isin(piece.index, kept).reshape(dense.size, -1).any(axis=1)
        return np.flatnonzero(gone)

    @cached_property
    def _inside_dropped(self) -> tuple[str, ...]:
        units = depth_units(self.dense) if self.dropped else {}
        return tuple(f"{units[unit]}." for unit in self.dropped)

    def _dense_name(self, parameter: str) -> str:
        """Name in the dense model of a parameter of the model that is left."""
        if not parameter.startswith(f"{self.path}."):
            return parameter
        layer, _, rest = parameter.removeprefix(f"{self.path}.").partition(".")
        return f"{self.path}.{self.layers[int(layer)]}.{rest}"

    def _in_dense(self, rows: Rows) -> Rows:
        """Indices of the model that is left, as the dense model counts them."""
        then = {}
        for (parameter, dim), index in rows.items():
            place = (self._dense_name(parameter), dim)
            then[place] = self.kept[place][index] if place in self.kept else index
        return then

    def _is_rest_of(self, dense: GroupFamily, group: int, rows: Rows) -> bool:
        """True where a group that cuts these indices is all that is left of a group of the dense model."""
        then = _rows(dense, group)
        for place, index in rows.items():
            whole = then.get(place, np.zeros(0, dtype=np.int64))
            left = np.intersect1d(whole, self.kept[place]) if place in self.kept else whole
            if not np.array_equal(left, index):
                return False
        return True


def _groups_with(dense: GroupFamily, rows: Rows) -> Iterator[int]:
    """Groups of a family that hold the first of some indices."""
    place, index = next(iter(rows.items()))
    for piece in dense.slices:
        if (piece.parameter, piece.dim) == place and len(index):
            yield from np.flatnonzero((piece.index.reshape(dense.size, -1) == index[0]).any(axis=1)).tolist()


def _rows(family: GroupFamily, group: int) -> Rows:
    """Sorted indices of one group by place."""
    rows: Rows = {}
    for piece in family.slices:
        place = (piece.parameter, piece.dim)
        rows[place] = np.union1d(rows.get(place, np.zeros(0, dtype=np.int64)), piece.of([group]))
    return rows


def _inside(unit: str) -> str:
    """``".mlp"`` of ``layers.5.mlp``, and nothing of ``layers.5``."""
    return "".join(f".{part}" for part in unit.split(".")[2:])
