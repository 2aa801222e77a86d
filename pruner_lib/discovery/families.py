"""The nouns of discovery: coupled slices, families of groups, and the map that holds them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

KINDS = (
    "attention_head",
    "query_head",
    "mlp_neuron",
    "latent_channel",
    "hidden_channel",
    "qk_channel",
    "value_channel",
    "expert",
    "vocabulary",
    "position",
    "other",
)


@dataclass(frozen=True, eq=False)
class CoupledSlice:
    """The part of one parameter that belongs to the groups of a family.

    ``index[i]`` lists the indices of dimension ``dim`` that go when group ``i`` goes. With two
    heads of three channels, ``q_proj.weight`` has ``dim=0`` and ``index=[[0, 1, 2], [3, 4, 5]]``.

    Attributes:
        parameter: name as in ``model.named_parameters()`` or ``model.named_buffers()``.
        dim: the dimension that is cut.
        index: integer array ``[size, k]``.
        shape: of the whole parameter.
    """

    parameter: str
    dim: int
    index: np.ndarray
    shape: tuple[int, ...] = ()

    def of(self, groups: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sorted indices of ``dim`` that belong to any of ``groups``."""
        return np.unique(self.index[np.asarray(groups, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class GroupFamily:
    """All groups that repeat one coupling pattern over an index: the MLP neurons of layer 5.

    Attributes:
        name: unique in its map, for example ``"layers.5.mlp_neuron"``.
        kind: what one group is; one of :data:`KINDS`.
        layer: decoder layer counted from 0, or None when the family spans layers.
        size: number of groups.
        slices: the coupled slices, in the order in which the model uses them; the last one
            belongs to the layer that reads the group last (``down_proj``, ``o_proj``).
        blocked: why the family must not or cannot be cut, or None.
        normed_by: modules that average over the family's own channels (norms), or let the family's
            groups compete (a router's softmax and top-k).
        partition: for query heads, the KV group of each; every part must keep the same number.
        at_least: how many groups must stay: of experts, as many as the router chooses for a token.
    """

    name: str
    kind: str
    layer: int | None
    size: int
    slices: tuple[CoupledSlice, ...]
    blocked: str | None = None
    normed_by: tuple[str, ...] = ()
    partition: np.ndarray | None = None
    at_least: int = 1

    @property
    def cuttable(self) -> bool:
        return self.blocked is None

    def plot(self, groups: int | Sequence[int] = 0) -> Any:
        """The family's matrices, the slices of some groups as stripes; see ``pruner_lib.display``."""
        from pruner_lib import display

        from .dependency_map import DependencyMap

        shapes = {piece.parameter: piece.shape for piece in self.slices}
        alone = DependencyMap((self,), shapes, aliases={}, num_layers=1, without_rule={})
        return display.draw_family(alone, self, groups)

    def __repr__(self) -> str:
        where = f", layer {self.layer}" if self.layer is not None else ""
        state = f", blocked: {self.blocked}" if self.blocked else ""
        return f"GroupFamily({self.name}: {self.size} × {self.kind}{where}{state})"


Removal = Mapping[str, Sequence[int]]


def group_numbers(family: GroupFamily, groups: Iterable[int]) -> list[int]:
    """Groups of a family, sorted and each once.

    Raises:
        ValueError: something that is no whole number, or a group that the family has not.
    """
    given = list(groups) if isinstance(groups, Iterable) else [None]
    numbers = [number for group in given if (number := whole_number(group)) is not None]
    if len(numbers) < len(given):
        raise ValueError(f"{family.name}: groups must be whole numbers, not {groups!r}")
    outside = [number for number in numbers if not 0 <= number < family.size]
    if outside:
        raise ValueError(
            f"{family.name} has no group {outside[0]}: it has {family.size} groups, counted from 0 to "
            f"{family.size - 1}"
        )
    return sorted(set(numbers))


def whole_number(value: Any) -> int | None:
    """An integer of Python, NumPy or torch; None for anything else.

    True and False are no numbers here: a mask over the layers must not be read as layers 0 and 1.
    """
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


class UnknownFamilyError(KeyError):
    """A family name that the map does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])
