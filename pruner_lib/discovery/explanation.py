"""Why slices belong together: the chain of operators between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .families import CoupledSlice, GroupFamily
from .state import Dim, Trace
from .tracing import run

if TYPE_CHECKING:
    from .dependency_map import DependencyMap


MOST_LINKS = 24  # printed per group; residual channels run through every matrix of the model


@dataclass(frozen=True)
class Link:
    """One slice of a group and the operators that tie it to the slice that was asked about."""

    parameter: str
    dim: int
    indices: tuple[int, ...]
    because: tuple[str, ...]
    family: str = ""

    @property
    def place(self) -> str:
        """Parameter, dimension and the first indices."""
        more = f", … ({len(self.indices)})" if len(self.indices) > 4 else ""
        return f"{self.parameter}[dim {self.dim}: {', '.join(map(str, self.indices[:4]))}{more}]"

    def __str__(self) -> str:
        return f"{self.place}  {' → '.join(self.because) if self.because else 'asked about'}"


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
        for family, group in zip(self.families, self.groups, strict=True):
            links = [link for link in self.links if link.family == family.name]
            width = min(max(len(link.place) for link in links), 60)
            lines.append(f"  group {group} of {family!r}")
            lines += [
                f"    {link.place:<{width}}  {' → '.join(link.because) or 'asked about'}"
                for link in links[:MOST_LINKS]
            ]
            if len(links) > MOST_LINKS:
                lines.append(f"    … and {len(links) - MOST_LINKS} more slices (see .links)")
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
    found = [
        (family, piece, piece.index[group], _terms(labels, piece)[piece.index[group]])
        for family, group in zip(families, groups, strict=True)
        for piece in family.slices
    ]
    chains = _chains(trace, int(asked[index]), np.concatenate([terms for *_, terms in found]))
    links = []
    for family, piece, indices, terms in found:
        ways = [chains[t] for t in terms.tolist() if t in chains]
        because = min(ways, key=len, default=())
        links.append(Link(piece.parameter, piece.dim, tuple(indices.tolist()), because, family.name))
    return Explanation(question, tuple(families), tuple(groups), tuple(links))


def _terms(labels: Mapping[str, Sequence[Dim]], piece: CoupledSlice) -> np.ndarray:
    carried = labels[piece.parameter][piece.dim]
    assert isinstance(carried, np.ndarray)
    return carried


@dataclass(frozen=True, eq=False)
class _Steps:
    """Edges between terms in compressed rows: those of term ``t`` are ``start[t]`` to ``start[t + 1]``."""

    start: np.ndarray
    target: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]


def _steps(trace: Trace) -> _Steps:
    """A step goes between equal terms, from a pair to its parts and from a part to pairs that hold it."""
    reasons, lefts, rights, whys = [""], [], [], []
    for equation in trace.equations or []:
        reasons.append(f"{equation.operator} ({equation.module or 'the model'})")
        lefts.append(equation.left)
        rights.append(equation.right)
        whys.append(np.full(len(equation.left), len(reasons) - 1, dtype=np.int32))
    for table in trace.store._pairs:
        for column in (1, 2):
            lefts.append(table[:, 0])
            rights.append(table[:, column])
            whys.append(np.zeros(len(table), dtype=np.int32))
    left, right, why = (np.concatenate([np.zeros(0, np.int32), *column]) for column in (lefts, rights, whys))
    source = np.concatenate([left, right])
    order = np.argsort(source, kind="stable")
    start = np.searchsorted(source[order], np.arange(len(trace.store) + 1))
    return _Steps(
        start, np.concatenate([right, left])[order], np.concatenate([why, why])[order], tuple(reasons)
    )


def _chains(trace: Trace, start: int, wanted: np.ndarray) -> dict[int, tuple[str, ...]]:
    """Per wanted term, the operators on a shortest way from ``start``; breadth first, a level at a time."""
    steps = _steps(trace)
    before = np.full(len(trace.store), -1, dtype=np.int32)
    reason = np.zeros(len(trace.store), dtype=np.int32)
    before[start] = start
    frontier = np.array([start])
    while len(frontier) and (before[wanted] < 0).any():
        counts = steps.start[frontier + 1] - steps.start[frontier]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        edge = np.repeat(steps.start[frontier], counts) + offset
        origin, target = np.repeat(frontier, counts), steps.target[edge]
        fresh = before[target] < 0
        target, first = np.unique(target[fresh], return_index=True)
        before[target] = origin[fresh][first]
        reason[target] = steps.reason[edge][fresh][first]
        frontier = target
    return {int(t): _walk_back(int(t), before, reason, steps.reasons) for t in wanted if before[t] >= 0}


def _walk_back(
    term: int, before: np.ndarray, reason: np.ndarray, reasons: tuple[str, ...]
) -> tuple[str, ...]:
    chain: list[str] = []
    while before[term] != term:
        why = reasons[reason[term]]
        if why and chain[-1:] != [why]:
            chain.append(why)
        term = int(before[term])
    return tuple(reversed(chain))
