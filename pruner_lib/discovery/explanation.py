"""Why slices belong together: the chain of operators between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .families import GroupFamily
from .state import Trace
from .tracing import run

if TYPE_CHECKING:
    from .dependency_map import DependencyMap


@dataclass(frozen=True)
class Link:
    """One slice of a group and the operators that tie it to the slice that was asked about."""

    parameter: str
    dim: int
    indices: tuple[int, ...]
    because: tuple[str, ...]

    def __str__(self) -> str:
        more = f", … ({len(self.indices)})" if len(self.indices) > 4 else ""
        few = ", ".join(map(str, self.indices[:4])) + more
        why = " → ".join(self.because) if self.because else "asked about"
        return f"{self.parameter}[dim {self.dim}: {few}]  {why}"


@dataclass(frozen=True, eq=False)
class Explanation:
    """The groups one index belongs to, with the reason for each of their slices."""

    question: str
    families: tuple[GroupFamily, ...]
    groups: tuple[int, ...]
    links: tuple[Link, ...]

    def __str__(self) -> str:
        if not self.families:
            return f"{self.question} belongs to no group: nothing else is tied to it"
        lines = [f"{self.question} belongs to"]
        lines += [f"  group {g} of {f!r}" for f, g in zip(self.families, self.groups, strict=True)]
        lines += [f"    {link}" for link in self.links]
        return "\n".join(lines)

    __repr__ = __str__


def explain_group(dependencies: DependencyMap, parameter: str, dim: int, index: int) -> Explanation:
    """See :meth:`DependencyMap.explain`."""
    parameter = dependencies.aliases.get(parameter, parameter)
    if parameter not in dependencies.shapes:
        raise KeyError(f"no parameter {parameter!r}; known are {', '.join(list(dependencies.shapes)[:4])}, …")
    shape = dependencies.shapes[parameter]
    if not -len(shape) <= dim < len(shape) or not 0 <= index < shape[dim]:
        raise IndexError(f"{parameter} has shape {shape}: dimension {dim}, index {index} lies outside it")
    dim %= len(shape)
    families, groups = [], []
    for family in dependencies.families:
        for piece in family.slices:
            if piece.parameter == parameter and piece.dim == dim:
                rows = np.flatnonzero((piece.index == index).any(axis=1))
                families += [family] * len(rows)
                groups += rows.tolist()
    question = f"{parameter}[dim {dim}, index {index}]"
    if not families:
        return Explanation(question, (), (), ())
    assert dependencies._model is not None
    trace, labels = run(dependencies._model, dependencies._inputs, log=True)
    asked = labels[parameter][dim]
    assert isinstance(asked, np.ndarray)
    chains = _chains(trace, int(asked[index]))
    links = []
    for family, group in zip(families, groups, strict=True):
        for piece in family.slices:
            indices = tuple(piece.index[group].tolist())
            carried = labels[piece.parameter][piece.dim]
            assert isinstance(carried, np.ndarray)
            terms = carried[list(indices)].tolist()
            because = next((chains[t] for t in terms if t in chains), ())
            links.append(Link(piece.parameter, piece.dim, indices, because))
    return Explanation(question, tuple(families), tuple(groups), tuple(links))


def _chains(trace: Trace, start: int) -> dict[int, tuple[str, ...]]:
    """Breadth-first over equations and pairs: per reachable term, the operators on the way.

    A step goes between equal terms, from a pair to its parts and from a part to pairs that hold it.
    """
    steps: dict[int, list[tuple[int, str]]] = {}

    def connect(left: np.ndarray, right: np.ndarray, why: str) -> None:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            if a != b:
                steps.setdefault(a, []).append((b, why))
                steps.setdefault(b, []).append((a, why))

    for equation in trace.equations or []:
        connect(equation.left, equation.right, f"{equation.operator} ({equation.module or 'model'})")
    if trace.store._pairs:
        table = np.concatenate(trace.store._pairs)
        connect(table[:, 0], table[:, 1], "")
        connect(table[:, 0], table[:, 2], "")
    chains: dict[int, tuple[str, ...]] = {int(start): ()}
    queue = deque([int(start)])
    while queue:
        term = queue.popleft()
        for other, why in steps.get(term, ()):
            if other not in chains:
                known = chains[term]
                chains[other] = known if not why or known[-1:] == (why,) else (*known, why)
                queue.append(other)
    return chains
