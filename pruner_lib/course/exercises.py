"""Exercises read out of a notebook: task, solution and check, marked as nbgrader marks them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
_HEADING = re.compile(r"^### Exercise (\d+\.\d+): (.+)$", re.MULTILINE)
_EFFORT = re.compile(r"^Difficulty (●{1,3}○{0,2}) · about (\d+) minutes?$", re.MULTILINE)
_MARKS: dict[str, dict[str, Any]] = {
    "solution": {"grade": False, "solution": True, "locked": False},
    "check": {"grade": True, "solution": False, "locked": True, "points": 1},
}


class CourseError(ValueError):
    """An exercise that is not marked as it must be, or a folder that must not be written."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    Attributes:
        number: notebook and place, ``3.1``.
        title: from the heading of the task.
        difficulty: 1 to 3.
        minutes: about how long it takes.
        solution: source of the solution cell, markers included.
        check: source of the cell that checks it.
    """

    number: str
    title: str
    difficulty: int
    minutes: int
    solution: str
    check: str

    @property
    def function(self) -> str:
        """Name of the function to write."""
        return function_of(self.solution)

    @property
    def stub(self) -> str:
        """The solution cell as a student gets it."""
        return stub_of(self.solution, f"Exercise {self.number}: {self.title}")


def source_of(cell: Mapping[str, Any]) -> str:
    """A cell's source, which a notebook file holds as one text or as lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def mark_of(cell: Mapping[str, Any]) -> str | None:
    """``"solution"``, ``"check"`` or None: what nbgrader's metadata make of a cell."""
    mark = cell["metadata"].get("nbgrader")
    if not mark:
        return None
    return "solution" if mark.get("solution") else "check" if mark.get("grade") else None


def exercises_of(notebook: Mapping[str, Any]) -> list[Exercise]:
    """All exercises of a notebook, in their order.

    Args:
        notebook: a notebook file, parsed.

    Raises:
        CourseError: cells that are marked, or headed as an exercise, and do not make one; all are named.
    """
    found: list[Exercise] = []
    problems: list[str] = []
    cells = notebook["cells"]
    used: set[int] = set()
    for place, cell in enumerate(cells):
        heading = _HEADING.search(source_of(cell)) if cell["cell_type"] == "markdown" else None
        if heading:
            used |= {place + 1, place + 2}
            exercise, wrong = _read(heading, cells[place : place + 3])
            problems += [f"exercise {heading[1]}: {words}" for words in wrong]
            found += [exercise] if exercise else []
    problems += [
        f"cell {place} is marked as a {mark_of(cell)} and follows no task"
        for place, cell in enumerate(cells)
        if mark_of(cell) and place not in used
    ]
    if problems:
        raise CourseError("; ".join(problems))
    return found


def _read(heading: re.Match[str], cells: Sequence[Mapping[str, Any]]) -> tuple[Exercise | None, list[str]]:
    """One exercise from its three cells, or what is wrong with them."""
    number = heading[1]
    effort = _EFFORT.search(source_of(cells[0]))
    if not effort:
        return None, ["no line such as 'Difficulty ●●○ · about 8 minutes' below the heading"]
    if len(cells) < 3 or [mark_of(cell) for cell in cells[1:]] != ["solution", "check"]:
        return None, ["a solution cell and a check cell must follow the task"]
    wrong = []
    for kind, prefix, cell in zip(("solution", "check"), ("exercise", "check"), cells[1:], strict=True):
        named = {"grade_id": f"{prefix}-{number.replace('.', '-')}"}
        wanted = _MARKS[kind] | {"task": False, "schema_version": 3} | named
        if cell["metadata"]["nbgrader"] != wanted:
            wrong.append(f"the {kind} cell's nbgrader metadata must be {wanted}")
    solution, check = source_of(cells[1]), source_of(cells[2])
    try:
        stub_of(solution, "")
        function_of(solution)
    except CourseError as error:
        wrong.append(str(error))
    if wrong:
        return None, wrong
    full = effort[1].count("●")
    return Exercise(number, heading[2].strip(), full, int(effort[2]), solution, check), []


def function_of(solution: str) -> str:
    """Name of the one function that a solution cell defines."""
    names = [node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
    if len(names) != 1:
        raise CourseError(f"a solution cell defines one function; this one defines {names or 'none'}")
    return names[0]


def stub_of(solution: str, task: str) -> str:
    """A solution cell with the part between the markers replaced by ``raise NotImplementedError(task)``.

    Raises:
        CourseError: a marker is missing, doubled or in the wrong order.
    """
    kept: list[str] = []
    inside, replaced = False, 0
    for line in solution.splitlines():
        if line.strip() == BEGIN and not inside:
            inside, replaced = True, replaced + 1
            indent = line[: len(line) - len(line.lstrip())]
            kept.append(f"{indent}raise NotImplementedError({json.dumps(task, ensure_ascii=False)})")
        elif line.strip() == END and inside:
            inside = False
        elif line.strip() in (BEGIN, END):
            raise CourseError(f"the markers {BEGIN!r} and {END!r} do not come in pairs")
        elif not inside:
            kept.append(line)
    if inside or replaced != 1:
        raise CourseError(f"a solution stands between one {BEGIN!r} and one {END!r}; {replaced} were found")
    return "\n".join(kept)
