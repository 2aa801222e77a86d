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

from pruner_lib.discovery.families import GroupFamily, Removal
from pruner_lib.importance.storage import write_whole
from pruner_lib.pruning.validation import checked_removal

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

FORMAT = "pruner_lib.pruning_plan"
VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class PruningPlan:
    """Which groups of which families are removed. Nothing is cut until ``prune`` is called.

    A plan is data: it can be written by hand (:meth:`from_removal`), made from scores
    (``plan_pruning``), printed, saved, and asked what it will leave.

    Example:
        >>> plan = PruningPlan.from_removal(dependencies, {"layers.0.mlp_neuron": [3, 7]})
        >>> plan.removed_indices("model.layers.0.mlp.down_proj.weight")
        {1: array([3, 7])}

    Attributes:
        removal: family name to the sorted indices of the groups that go; never empty ones.
        dependencies: the map of the model the plan is for.

    Raises:
        UnknownFamilyError: a family name that the map does not hold.
        ValueError: a blocked family, a group that does not exist, every group of a family, or
            query heads removed unevenly from the KV groups.
    """

    removal: Mapping[str, tuple[int, ...]]
    dependencies: DependencyMap

    def __post_init__(self) -> None:
        removal = checked_removal(self.dependencies, self.removal)
        object.__setattr__(self, "removal", MappingProxyType(removal))

    @classmethod
    def from_removal(cls, dependencies: DependencyMap, removal: Removal) -> PruningPlan:
        """A plan written by hand.

        Args:
            dependencies: what ``discover`` found in the model.
            removal: family name to group indices, in any order; empty ones are dropped.

        Returns:
            The checked plan.

        Raises:
            UnknownFamilyError: see the class.
            ValueError: see the class.
        """
        return cls(removal=checked_removal(dependencies, removal), dependencies=dependencies)

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
        """Shape of every parameter and buffer after the cut, by canonical name."""
        shapes = {}
        for parameter, shape in self.dependencies.shapes.items():
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

    def _groups_gone(self, family: GroupFamily) -> int:
        if not family.slices:
            return 0
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
        others = {*self.dependencies.aliases, *_buffers(self.dependencies)}
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in others)

    def summary(self) -> str:
        """A compact table: one row for all families of a kind that lose the same number of groups."""
        before, after = self.params_before, self.params_after
        share = 100 * (before - after) / before if before else 0.0
        lines = [f"PruningPlan: {before:,} -> {after:,} parameters ({share:.1f} % removed)"]
        rows: dict[tuple[str, int, int], list[int | None]] = {}
        for family in self.dependencies.families:
            if family.name in self.removal:
                key = (family.kind, family.size, self.kept_sizes[family.name])
                rows.setdefault(key, []).append(family.layer)
        if not rows:
            return lines[0] + "\n  (nothing is removed)"
        lines.append(f"  {'kind':<16}{'layers':<16}{'groups':>8}{'kept':>8}{'removed':>9}")
        for (kind, size, kept), layers in rows.items():
            lines.append(f"  {kind:<16}{_ranges(layers):<16}{size:>8,}{kept:>8,}{size - kept:>9,}")
        return "\n".join(lines)

    __repr__ = summary
    __str__ = summary

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
            "version": VERSION,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "families": {family.name: family.size for family in self.dependencies.families},
            "removal": {name: list(groups) for name, groups in self.removal.items()},
        }
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
        plan = cls.from_removal(dependencies, document["removal"])
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
    if document.get("version") != VERSION:
        found = document.get("version")
        raise ValueError(f"{path} is a plan of version {found!r}; this library reads version {VERSION}")
    missing = {"families", "removal", "params_before"} - set(document)
    if missing:
        raise ValueError(f"{path} is not a whole pruning plan: {', '.join(sorted(missing))} missing")
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


def _buffers(dependencies: DependencyMap) -> frozenset[str]:
    """Names in the map that are buffers, which no count of parameters includes."""
    skeleton = getattr(dependencies, "_model", None)  # meta copy of the model; absent in a hand-written map
    return frozenset(name for name, _ in skeleton.named_buffers()) if skeleton is not None else frozenset()


def _ranges(layers: Iterable[int | None]) -> str:
    """``[4, 5, 6, 9]`` as ``"4-6, 9"``; families that span layers as ``"all"``."""
    numbers = sorted(layer for layer in layers if layer is not None)
    if not numbers:
        return "all"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[-1] > run[0] else str(run[0]) for run in runs)


__all__ = ["PruningPlan"]
