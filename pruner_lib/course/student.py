"""Student versions of the notebooks: solutions taken out, outputs cleared, nothing else changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruner_lib.assets.files import write_whole
from pruner_lib.course.exercises import CourseError, Exercise, exercises_of, mark_of, source_of


def student_version(notebook: Mapping[str, Any], *, solutions: bool = False) -> dict[str, Any]:
    """A copy of a notebook for students.

    The part of each solution between its markers becomes ``raise NotImplementedError``; outputs and the
    state of widgets go, so that predictions come before results. Check cells may fail without ending
    "Run All", and solution cells are no longer folded.

    Args:
        notebook: a notebook file, parsed; it is not changed.
        solutions: leave the solutions in, for a tool that takes them out itself (nbgrader).

    Raises:
        CourseError: an exercise is not marked as it must be.
    """
    stubs = {exercise.solution: exercise.stub for exercise in exercises_of(notebook)}
    made = copy.deepcopy(dict(notebook))
    made["metadata"].pop("widgets", None)
    for cell in made["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["outputs"], cell["execution_count"] = [], None
        cell["metadata"].pop("execution", None)
        if mark_of(cell) == "solution":
            cell["source"] = source_of(cell) if solutions else stubs[source_of(cell)]
            _unfold(cell["metadata"])
        elif mark_of(cell) == "check":
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "raises-exception"]
    return made


def _unfold(metadata: dict[str, Any]) -> None:
    metadata.pop("jupyter", None)
    tags = [tag for tag in metadata.get("tags", []) if tag != "hide-input"]
    metadata["tags"] = tags
    if not tags:
        del metadata["tags"]


def read_notebooks(folder: Path) -> dict[Path, dict[str, Any]]:
    """All notebooks of a folder, parsed, in order of their names.

    Raises:
        CourseError: there is none, or one is no notebook.
    """
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise CourseError(f"no notebook in {folder}; run this from the project's folder or give --notebooks")
    read = {}
    for path in paths:
        try:
            read[path] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CourseError(f"{path} cannot be read as a notebook: {error}") from error
    return read


def list_exercises(folder: Path) -> dict[str, list[Exercise]]:
    """The exercises of every notebook of a folder, by the notebook's name."""
    return {path.stem: _of(path, notebook) for path, notebook in read_notebooks(folder).items()}


def _of(path: Path, notebook: Mapping[str, Any]) -> list[Exercise]:
    try:
        return exercises_of(notebook)
    except CourseError as error:
        raise CourseError(f"{path.name}: {error}") from error


def write_students(
    source: Path, target: Path, *, replace: bool = False, solutions: bool = False
) -> list[Path]:
    """Write the student version of every notebook of ``source`` into ``target``.

    All are made before the first is written, and none is written over a file that is there already,
    since a student may have worked in it.

    Args:
        source: folder of the notebooks with solutions.
        target: folder to write to; made when missing.
        replace: write over notebooks that are there.
        solutions: as for :func:`student_version`.

    Returns:
        The files written.

    Raises:
        CourseError: an exercise is wrongly marked; ``target`` is ``source``; files are there already.
    """
    if target.resolve() == source.resolve():
        raise CourseError(f"{target} holds the notebooks with solutions; give another folder")
    notebooks = read_notebooks(source)
    for path, notebook in notebooks.items():
        _of(path, notebook)
    made = {
        target / path.name: student_version(notebook, solutions=solutions)
        for path, notebook in notebooks.items()
    }
    there = [path.name for path in made if path.exists()]
    if there and not replace:
        raise CourseError(
            f"{target} already holds {', '.join(there)}, perhaps with a student's work; "
            "give another folder, or --replace to write over them"
        )
    target.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(notebook, indent=1, ensure_ascii=False) for path, notebook in made.items()}
    return [write_whole(path, text + "\n") for path, text in texts.items()]
