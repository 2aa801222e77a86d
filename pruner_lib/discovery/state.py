"""What discovery knows of each tensor while the model runs: the labels of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import numpy as np
import torch

from .labels import LabelStore, Terms


class Mark(Enum):
    """Stands in for labels."""

    ANY = "any"


ANY: Final = Mark.ANY
"""A dimension of equal constants: it fits whatever it meets and ties nothing."""

Dim = Terms | Mark | None
"""Labels of one dimension; None for one that is never cut (batch, sequence); ANY for equal constants."""


@dataclass
class Info:
    """Labels of a tensor's dimensions, and where the tensor comes from."""

    dims: list[Dim]
    source: str | None = None  # the parameter or buffer this is a view of
    from_tokens: bool = False  # computed from the token ids
    learned: bool = False  # computed from at least one parameter
    quiet: bool = True  # zero wherever a labelled index has been zeroed in the parameters
    points: Dim = None  # labels of the dimension that its values, chosen by top-k, are indices of


@dataclass(frozen=True, eq=False)
class Event:
    """Something an operator did that says what a dimension is for."""

    role: str
    labels: Terms
    module: str
    operator: str
    axis: int = -1  # the dimension it was, counted from the end


@dataclass(frozen=True, eq=False)
class Equation:
    """One statement ``left[i] = right[i]`` and who made it."""

    left: Terms
    right: Terms
    operator: str
    module: str


@dataclass
class Trace:
    """The state of one symbolic run: tensors, labels, events, blocks."""

    store: LabelStore = field(default_factory=LabelStore)
    infos: dict[int, Info] = field(default_factory=dict)
    keep: list[torch.Tensor] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    blocks: list[tuple[Terms, str]] = field(default_factory=list)
    rivals: list[tuple[Terms, str]] = field(default_factory=list)  # blocked unless top-k chooses among them
    floors: list[tuple[Terms, int]] = field(default_factory=list)  # how many of them top-k takes
    factors: list[tuple[str, str, float]] = field(default_factory=list)  # numbers written into the code
    without_rule: dict[str, set[str]] = field(default_factory=dict)
    equations: list[Equation] | None = None
    used: dict[str, int] = field(default_factory=dict)  # parameters in the order of their first use
    module: str = ""
    operator: str = ""

    def info(self, tensor: Any) -> Info:
        known = self.infos.get(id(tensor))
        if known is None:
            known = Info([None] * tensor.dim())
            self.set(tensor, known)
        return known

    def set(self, tensor: torch.Tensor, info: Info) -> None:
        self.infos[id(tensor)] = info
        self.keep.append(tensor)  # an id is only unique while the object lives

    def dims(self, tensor: torch.Tensor) -> list[Dim]:
        return self.info(tensor).dims

    def equate(self, left: Terms, right: Terms) -> None:
        if left is right:
            return
        news = self.store.equate(left, right)
        if news and self.equations is not None:
            self.equations.append(Equation(left.copy(), right.copy(), self.operator, self.module))

    def record(self, role: str, *dims: Dim, axis: int = -1) -> None:
        for dim in dims:
            if isinstance(dim, np.ndarray):
                self.events.append(Event(role, dim, self.module, self.operator, axis))

    def block(self, dim: Dim, reason: str) -> None:
        if isinstance(dim, np.ndarray):
            self.blocks.append((dim, reason))

    def where(self) -> str:
        return f"{self.operator} in {self.module or 'the model'}"

    def unify(self, dims: Sequence[Dim], what: str) -> Dim:
        """The common labels of dimensions that must agree index by index."""
        labelled = [dim for dim in dims if isinstance(dim, np.ndarray)]
        if not labelled:
            return None if any(dim is None for dim in dims) else ANY
        for other in labelled[1:]:
            self.equate(labelled[0], other)
        if any(dim is None for dim in dims):
            self.block(labelled[0], f"{what} values the code fixes for each index ({self.where()})")
        return labelled[0]
