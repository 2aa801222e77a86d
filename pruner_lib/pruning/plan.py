"""A pruning plan: which groups of which families go, and exactly what that leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pruner_lib.assets.files import write_whole
from pruner_lib.discovery.families import GroupFamily, Removal
from pruner_lib.discovery.units import depth_units
from pruner_lib.pruning.costs import Cost, cost_terms
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.plan_text import plan_as_text
from pruner_lib.pruning.units import checked_units, without_dropped
from pruner_lib.pruning.validation import checked_removal

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

FORMAT = "pruner_lib.pruning_plan"
VERSION = 2  # 1 has no "dropped"


@dataclass(frozen=True, eq=False, repr=False)
class PruningPlan:
    """Which groups of which families are removed, and which layers. Nothing is cut until ``prune`` is called.

    A plan is data: it can be written by hand (:meth:`from_removal`), made from scores
    (``plan_pruning``), printed, saved, and asked what it will leave.

    Example:
        >>> plan = PruningPlan.from_removal(dependencies, {"layers.0.mlp_neuron": [3, 7]})
        >>> plan.removed_indices("model.layers.0.mlp.down_proj.weight")
        {1: array([3, 7])}

    Attributes:
        removal: family name to the sorted indices of the groups that go; never empty ones.
        dependencies: the map of the model the plan is for.
        dropped: layers and sublayers that go whole: ``"layers.5"``, ``"layers.5.attention"``,
            ``"layers.5.mlp"``. Families inside them go with them and are not in ``removal``.

    Raises:
        UnknownFamilyError: a family name that the map does not hold.
        ValueError: a blocked family, a group that does not exist, every group of a family, query
            heads removed unevenly from the KV groups, an unknown layer, or every layer.
    """

    removal: Mapping[str, tuple[int, ...]]
    dependencies: DependencyMap
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        dropped = checked_units(self.dependencies, self.dropped)
        kept = without_dropped(self.dependencies, self.removal, dropped)
        removal = checked_removal(self.dependencies, kept)
        object.__setattr__(self, "dropped", dropped)
        object.__setattr__(self, "removal", MappingProxyType(removal))

    @classmethod
    def from_removal(
        cls, dependencies: DependencyMap, removal: Removal, *, dropped: Iterable[str] = ()
    ) -> PruningPlan:
        """A plan written by hand.

        Args:
            dependencies: what ``discover`` found in the model.
            removal: family name to group indices, in any order; empty ones are left out.
            dropped: layers and sublayers that go whole, see the class.

        Returns:
            The checked plan.

        Raises:
            UnknownFamilyError: see the class.
            ValueError: see the class.
        """
        units = (dropped,) if isinstance(dropped, str) else tuple(dropped)
        return cls(removal=removal, dependencies=dependencies, dropped=units)  # type: ignore[arg-type]

    @property
    def width(self) -> PruningPlan:
        """The same plan with every layer in place: what is cut from the layers before some are dropped."""
        return PruningPlan(removal=self.removal, dependencies=self.dependencies) if self.dropped else self

    @cached_property
    def dropped_modules(self) -> dict[str, str]:
        """Dropped unit to the path of its module in the dense model."""
        units = depth_units(self.dependencies) if self.dropped else {}
        return {unit: units[unit] for unit in self.dropped}

    @cached_property
    def _removed(self) -> dict[str, dict[int, np.ndarray]]:
        """Parameter to dimension to sorted indices, the union over all removed families."""
        families = {family.name: family for family in self.dependencies.families}
        pieces: dict[tuple[str, int], list[np.ndarray]] = {}
        for name, groups in self.removal.items():
            for piece in families[name].slices:
                key = (self._canonical(piece.parameter), piece.dim)
                pieces.setdefault(key, []).append(piece.of(groups))
        removed: dict[str, dict[int, np.ndarray]] = {}
        for (parameter, dim), indices in pieces.items():
            removed.setdefault(parameter, {})[dim] = np.unique(np.concatenate(indices))
        return removed

    def _canonical(self, parameter: str) -> str:
        return self.dependencies.aliases.get(parameter, parameter)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the parameters (and buffers) that the plan cuts, in map order of families."""
        return tuple(self._removed)

    def removed_indices(self, parameter: str) -> dict[int, np.ndarray]:
        """Sorted indices that go from each dimension of one parameter; empty if it stays whole.

        Args:
            parameter: name in the model; the name of a tied copy means the same parameter.
        """
        return {dim: index.copy() for dim, index in self._removed.get(self._canonical(parameter), {}).items()}

    def kept_indices(self, parameter: str) -> dict[int, torch.Tensor]:
        """Sorted indices that stay, ``LongTensor`` per dimension that is cut.

        Args:
            parameter: name in the model; the name of a tied copy means the same parameter.

        Raises:
            KeyError: the model has no such parameter.
        """
        shape = self._shape(parameter)
        kept = {}
        for dim, index in self.removed_indices(parameter).items():
            stays = np.ones(shape[dim], dtype=bool)
            stays[index] = False
            kept[dim] = torch.from_numpy(np.flatnonzero(stays))
        return kept

    def _shape(self, parameter: str) -> tuple[int, ...]:
        shape = self.dependencies.shapes.get(self._canonical(parameter))
        if shape is None:
            raise KeyError(f"no parameter {parameter!r} in the model this plan is for")
        return tuple(shape)

    def new_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer after the cut, by its name in the dense model.

        What lies in a dropped layer is absent.
        """
        shapes = {}
        inside = self._inside
        for parameter, shape in self.dependencies.shapes.items():
            if inside and parameter.startswith(inside):
                continue
            new = list(shape)
            for dim, index in self._removed.get(self._canonical(parameter), {}).items():
                new[dim] -= len(index)
            shapes[parameter] = tuple(new)
        return shapes

    @cached_property
    def kept_sizes(self) -> dict[str, int]:
        """Groups left in every family of the map, in map order.

        A group of a family that the plan does not name is gone as well when all of its slices
        are: with one of three KV heads go its three query heads, so 9 query heads become 6.
        """
        return {family.name: family.size - self._groups_gone(family) for family in self.dependencies.families}

    @property
    def _inside(self) -> tuple[str, ...]:
        return tuple(f"{path}." for path in self.dropped_modules.values())

    def _groups_gone(self, family: GroupFamily) -> int:
        if not family.slices:
            return 0
        inside = self._inside
        if inside and all(piece.parameter.startswith(inside) for piece in family.slices):
            return family.size
        gone = np.ones(family.size, dtype=bool)
        for piece in family.slices:
            index = self._removed.get(self._canonical(piece.parameter), {}).get(piece.dim)
            if index is None:
                return 0
            gone &= np.isin(piece.index, index).reshape(family.size, -1).all(axis=1)
        return int(gone.sum())

    @property
    def params_before(self) -> int:
        """Parameters of the dense model; tied ones count once."""
        return self._count(self.dependencies.shapes)

    @cached_property
    def params_after(self) -> int:
        """Parameters that remain, exact from the shapes alone; tied ones count once."""
        return self._count(self.new_shapes())

    @property
    def num_params_removed(self) -> int:
        """Parameters that go: ``params_before - params_after``."""
        return self.params_before - self.params_after

    def _count(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        others = {*self.dependencies.aliases, *self.dependencies.buffers}
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in others)

    def cost(self, *, batch_size: int = 1, seq_len: int = 64) -> Cost:
        """What the plan will leave, exactly, without cutting anything: what ``count_cost`` will say.

        The first call for one model and one size of batch traces the model (about two seconds at 7B);
        later ones take less than a millisecond.

        Args:
            batch_size: sequences of the counted pass.
            seq_len: tokens of each; 1 × 64 are the paper's.

        Returns:
            Parameters, multiply-accumulates, bytes of weights, and of KV cache per token.

        Raises:
            PruningError: the map holds no model, or a model that cannot be traced.
        """
        terms = cost_terms(self.dependencies)
        dropped = tuple(self.dropped_modules.values())
        return terms.planned(self.removal, dropped, batch_size=batch_size, seq_len=seq_len)

    @property
    def dense_cost(self) -> Cost:
        """The cost of the model before the cut, at 1 × 64 tokens."""
        return PruningPlan(removal={}, dependencies=self.dependencies).cost()

    def summary(self, *, cost: bool = False) -> str:
        """A compact table: one row for all families of a kind that lose the same number of groups.

        A kind that leaves more than six sizes, as global plans do, is one row from least to most.

        Args:
            cost: add multiply-accumulates, bytes and KV cache, which may have to be traced first.
        """
        return plan_as_text(self, self.dense_cost if cost else None)

    def __repr__(self) -> str:
        return self.summary()

    def __str__(self) -> str:
        try:
            return self.summary(cost=self.dependencies._model is not None)
        except PruningError:  # no model that could be traced; the parameters are known all the same
            return self.summary()

    def plot(self, **options: Any) -> Any:
        """Groups kept per layer and kind, drawn; see ``pruner_lib.display``."""
        from pruner_lib import display

        return display.plot_plan(self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; the file is replaced whole or not at all.

        Args:
            path: the file to write; its folder must exist.

        Returns:
            The path written.
        """
        document = {
            "format": FORMAT,
            "version": VERSION if self.dropped else 1,  # an older reader must not miss what is dropped
            "params_before": self.params_before,
            "params_after": self.params_after,
            "families": {family.name: family.size for family in self.dependencies.families},
            "removal": {name: list(groups) for name, groups in self.removal.items()},
        }
        if self.dropped:
            document["dropped"] = list(self.dropped)
        return write_whole(Path(path), json.dumps(document, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str], dependencies: DependencyMap) -> PruningPlan:
        """Read a plan that :meth:`save` wrote and check that it is for this model.

        Args:
            path: the JSON file.
            dependencies: what ``discover`` finds in the (dense) model to be cut.

        Raises:
            ValueError: not a plan file, or a plan for a model with other families or sizes.
        """
        document = _read(Path(path))
        _check_same_model(Path(path), document, dependencies)
        plan = cls.from_removal(dependencies, document["removal"], dropped=document.get("dropped", ()))
        if plan.params_before != document["params_before"]:
            raise ValueError(
                f"{path} is a plan for another model: made for {document['params_before']:,} parameters, "
                f"this model has {plan.params_before:,}; plan again with plan_pruning"
            )
        return plan


def _read(path: Path) -> dict[str, Any]:
    """The JSON document of a plan file, checked for format, version and completeness."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a pruning plan: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path} is not a pruning plan: it does not say "format": "{FORMAT}"')
    if document.get("version") not in (1, VERSION):
        found = document.get("version")
        raise ValueError(f"{path} is a plan of version {found!r}; this library reads versions 1 to {VERSION}")
    missing = {"families", "removal", "params_before"} - set(document)
    if missing:
        raise ValueError(f"{path} is not a whole pruning plan: {', '.join(sorted(missing))} missing")
    removal, dropped = document["removal"], document.get("dropped", [])
    lists = [dropped, *(removal.values() if isinstance(removal, dict) else ())]
    if (
        not all(isinstance(document[name], dict) for name in ("families", "removal"))
        or not all(isinstance(found, list) for found in lists)
        or not all(isinstance(unit, str) for unit in dropped)
    ):
        raise ValueError(
            f"{path} is no pruning plan as PruningPlan.save writes it: families and removal are objects, the "
            "groups of each family a list, and dropped a list of names"
        )
    return document


def _check_same_model(path: Path, document: Mapping[str, Any], dependencies: DependencyMap) -> None:
    expected = document["families"]
    found = {family.name: family.size for family in dependencies.families}
    differing = [
        f"{name}: {expected.get(name, 'absent')} in the plan, {found.get(name, 'absent')} in the model"
        for name in dict.fromkeys((*expected, *found))
        if expected.get(name) != found.get(name)
    ]
    if differing:
        more = f" … and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{path} is a plan for another model: the groups differ in {'; '.join(differing[:3])}{more}. "
            "Load the model the plan was made for, or plan again with plan_pruning"
        )


__all__ = ["PruningPlan"]
