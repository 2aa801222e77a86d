"""Every exercise of every notebook: the solution passes, the stub is unwritten, wrong answers are told why.

Wrong answers stand in ``tests/wrong_NN.py``, one file per notebook: ``WRONG["3.1"]`` maps words that the
check's message must hold (a regular expression) to a function that a student might write.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch

import pruner_lib as pl
from pruner_lib.course.exercises import exercises_of, mark_of, source_of
from pruner_lib.course.student import read_notebooks, student_version

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = read_notebooks(FOLDER)
EXERCISES = {each.number: each for notebook in NOTEBOOKS.values() for each in exercises_of(notebook)}
WRONG = {
    number: answers
    for file in sorted(Path(__file__).parent.glob("wrong_[0-9][0-9].py"))
    for number, answers in importlib.import_module(file.stem).WRONG.items()
}

each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
each_wrong_answer = pytest.mark.parametrize(
    ("number", "words"),
    [(number, words) for number, answers in WRONG.items() for words in answers],
)


def run(definition, check):
    """Both cells, with no more than a notebook's usual imports at hand."""
    names = {"torch": torch, "pl": pl}
    exec(definition, names)
    exec(check, names)


@each_exercise
def test_the_solution_passes(exercise, capfd):
    run(exercise.solution, exercise.check)
    said, noise = capfd.readouterr()
    assert said.startswith(f"Exercise {exercise.number} is right: ") and said.count("\n") == 1
    assert noise == ""


@each_exercise
def test_the_stub_is_only_unwritten(exercise):
    with pytest.raises(NotImplementedError, match=rf"^Exercise {exercise.number}: "):
        run(exercise.stub, exercise.check)


@each_exercise
def test_at_least_two_wrong_answers_are_known(exercise):
    assert len(WRONG.get(exercise.number, {})) >= 2


@each_wrong_answer
def test_a_wrong_answer_is_told_what_is_wrong(number, words):
    exercise = EXERCISES[number]
    names = {"torch": torch, "pl": pl, exercise.function: WRONG[number][words]}
    with pytest.raises(AssertionError, match=words):
        exec(exercise.check, names)


@each_exercise
def test_the_task_is_kept_beside_the_stub(exercise):
    (function,) = ast.parse(exercise.stub).body
    assert ast.get_docstring(function), "the stub's docstring says what to return"
    assert len(exercise.solution.splitlines()) <= 20 and len(exercise.check.splitlines()) <= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_few_exercises_in_order(path):
    numbers = [exercise.number for exercise in exercises_of(NOTEBOOKS[path])]
    assert (1 if path.stem.startswith("00") else 2) <= len(numbers) <= 4
    assert numbers == [f"{int(path.stem[:2])}.{place}" for place in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_other_cell_needs_an_exercise(path):
    functions = {exercise.function for exercise in exercises_of(NOTEBOOKS[path])}
    for cell in NOTEBOOKS[path]["cells"]:
        if cell["cell_type"] == "code" and mark_of(cell) is None:
            used = {node.id for node in ast.walk(ast.parse(source_of(cell))) if isinstance(node, ast.Name)}
            assert used & functions == set(), source_of(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_student_version_holds_no_solution(path):
    text = json.dumps(student_version(NOTEBOOKS[path]), ensure_ascii=False)
    assert "BEGIN SOLUTION" not in text and "END SOLUTION" not in text
    made = student_version(NOTEBOOKS[path])["cells"]
    before = NOTEBOOKS[path]["cells"]
    changed = [place for place, cell in enumerate(made) if source_of(cell) != source_of(before[place])]
    assert changed == [place for place, cell in enumerate(before) if mark_of(cell) == "solution"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_are_folded_and_hints_too(path):
    for place, cell in enumerate(NOTEBOOKS[path]["cells"]):
        if mark_of(cell) == "solution":
            assert cell["metadata"]["jupyter"] == {"source_hidden": True}
            assert "hide-input" in cell["metadata"]["tags"]
            task = source_of(NOTEBOOKS[path]["cells"][place - 1])
            assert "<details><summary>Hint</summary>" in task and "</details>" in task
