"""Student versions: exercises found by their marks, solutions taken out, nobody's work written over."""

from __future__ import annotations

import copy
import json
import re
import shutil

import nbformat
import pytest

from pruner_lib.course.__main__ import exercise_table, main
from pruner_lib.course.checking import alike, passed, require, require_equal, shown
from pruner_lib.course.exercises import CourseError, exercises_of, function_of, stub_of
from pruner_lib.course.machine import machine_report, memory_line
from pruner_lib.course.student import list_exercises, student_version, write_students

TASK = """### Exercise 9.1: Twice "as" much
Difficulty ●●○ · about 8 minutes

Double it.

<details><summary>Hint</summary>Add it to itself.</details>"""
SOLUTION = '''def twice(x):
    """Two x."""
    ### BEGIN SOLUTION
    result = x + x
    return result
    ### END SOLUTION'''
STUB = '''def twice(x):
    """Two x."""
    raise NotImplementedError("Exercise 9.1: Twice \\"as\\" much")'''
CHECK = "assert twice(2) == 4"
COMMON = {"task": False, "schema_version": 3}
MARK = COMMON | {"grade": False, "solution": True, "locked": False, "grade_id": "exercise-9-1"}
CHECK_MARK = COMMON | {"grade": True, "solution": False, "locked": True, "grade_id": "check-9-1", "points": 1}


def notebook() -> dict:
    """A notebook with one exercise, as a file would hold it."""
    make = nbformat.v4
    cells = [
        make.new_markdown_cell("# Title"),
        make.new_code_cell("print(1)", execution_count=1, outputs=[make.new_output("stream", text="1\n")]),
        make.new_markdown_cell(TASK),
        make.new_code_cell(
            SOLUTION,
            metadata={"nbgrader": MARK, "jupyter": {"source_hidden": True}, "tags": ["hide-input"]},
            execution_count=2,
        ),
        make.new_code_cell(CHECK, metadata={"nbgrader": CHECK_MARK}, execution_count=3),
    ]
    made = make.new_notebook(cells=cells, metadata={"widgets": {"state": {}}})
    return json.loads(nbformat.writes(made))


def without(place: int, key: str = "nbgrader") -> dict:
    """That notebook with a piece of one cell's metadata gone."""
    made = notebook()
    del made["cells"][place]["metadata"][key]
    return made


def test_an_exercise_is_read_from_its_three_cells():
    (found,) = exercises_of(notebook())
    assert (found.number, found.title, found.difficulty, found.minutes) == ("9.1", 'Twice "as" much', 2, 8)
    assert found.function == "twice"
    assert (found.solution, found.check, found.stub) == (SOLUTION, CHECK, STUB)


def test_the_student_version_has_stubs_and_no_outputs():
    source = notebook()
    before = copy.deepcopy(source)
    made = student_version(source)
    assert source == before
    assert "".join(made["cells"][3]["source"]) == STUB
    assert made["cells"][3]["metadata"] == {"nbgrader": MARK}
    assert made["cells"][4]["metadata"]["tags"] == ["raises-exception"]
    assert [(c["outputs"], c["execution_count"]) for c in made["cells"] if c["cell_type"] == "code"] == [
        ([], None)
    ] * 3
    assert made["cells"][2] == before["cells"][2] and "widgets" not in made["metadata"]
    nbformat.validate(nbformat.from_dict(made))


def test_solutions_can_be_kept_for_nbgrader():
    made = student_version(notebook(), solutions=True)
    assert made["cells"][3]["source"] == SOLUTION and made["cells"][3]["metadata"] == {"nbgrader": MARK}
    assert made["cells"][1]["outputs"] == [] and made["cells"][4]["metadata"]["tags"] == ["raises-exception"]


def test_a_stub_raises_only_not_implemented():
    names: dict = {}
    exec(STUB, names)
    with pytest.raises(NotImplementedError, match=r"Exercise 9\.1"):
        names["twice"](2)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (without(3), "a solution cell and a check cell must follow"),
        (without(4), "a solution cell and a check cell must follow"),
        ({"cells": notebook()["cells"][:3]}, "a solution cell and a check cell must follow"),
        ({"cells": notebook()["cells"][3:]}, "cell 0 is marked as a solution and follows no task"),
    ],
)
def test_marks_that_make_no_exercise_are_named(broken, words):
    with pytest.raises(CourseError, match=words):
        exercises_of(broken)


def test_a_wrong_identifier_and_a_missing_effort_are_named():
    made = notebook()
    made["cells"][3]["metadata"]["nbgrader"]["grade_id"] = "exercise-9-2"
    with pytest.raises(CourseError, match=r"exercise 9\.1: the solution cell's .*exercise-9-1"):
        exercises_of(made)
    made = notebook()
    made["cells"][2]["source"] = "### Exercise 9.1: Twice\n\nDouble it."
    with pytest.raises(CourseError, match="Difficulty"):
        exercises_of(made)


@pytest.mark.parametrize(
    "solution",
    [
        "def f():\n    return 1",
        "def f():\n    ### BEGIN SOLUTION\n    return 1",
        "def f():\n    ### END SOLUTION\n    return 1",
        "def f():\n    ### BEGIN SOLUTION\n    ### BEGIN SOLUTION\n    ### END SOLUTION",
        "def f():\n    ### BEGIN SOLUTION\n    ### END SOLUTION\n"
        + "    ### BEGIN SOLUTION\n    ### END SOLUTION",
    ],
)
def test_markers_that_do_not_pair_are_refused(solution):
    with pytest.raises(CourseError, match="BEGIN SOLUTION"):
        stub_of(solution, "task")


def test_a_solution_cell_defines_one_function():
    with pytest.raises(CourseError, match="one function"):
        function_of("x = 1")
    with pytest.raises(CourseError, match=r"'f', 'g'"):
        function_of("def f(): pass\ndef g(): pass")


def test_nothing_is_written_over(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "09_toy.ipynb").write_text(json.dumps(notebook()), encoding="utf-8")
    (written,) = write_students(source, target)
    assert nbformat.read(written, as_version=4).cells[3].source == STUB
    written.write_text("a student's work", encoding="utf-8")
    with pytest.raises(CourseError, match=r"09_toy\.ipynb.*--replace"):
        write_students(source, target)
    assert written.read_text(encoding="utf-8") == "a student's work"
    write_students(source, target, replace=True)
    assert nbformat.read(written, as_version=4).cells[3].source == STUB


def test_one_broken_notebook_means_that_none_is_written(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "08_good.ipynb").write_text(json.dumps(notebook()), encoding="utf-8")
    (source / "09_bad.ipynb").write_text(json.dumps(without(4)), encoding="utf-8")
    with pytest.raises(CourseError, match=r"09_bad\.ipynb: exercise 9\.1"):
        write_students(source, target)
    assert not target.exists()


def test_bad_folders_are_refused(tmp_path, capsys):
    with pytest.raises(CourseError, match="no notebook"):
        write_students(tmp_path, tmp_path / "out")
    with pytest.raises(CourseError, match="another folder"):
        write_students(tmp_path, tmp_path)
    (tmp_path / "00.ipynb").write_text("{", encoding="utf-8")
    with pytest.raises(CourseError, match=r"00\.ipynb cannot be read"):
        list_exercises(tmp_path)
    assert main(["student", str(tmp_path / "out"), "--notebooks", str(tmp_path)]) == 1
    assert "00.ipynb cannot be read" in capsys.readouterr().err


def test_the_commands(tmp_path, capsys):
    (tmp_path / "09_toy.ipynb").write_text(json.dumps(notebook()), encoding="utf-8")
    assert main(["exercises", "--notebooks", str(tmp_path)]) == 0
    assert '| 9.1 | Twice "as" much | ●●○ | 8 |' in capsys.readouterr().out
    assert exercise_table(tmp_path).count("\n") == 2
    assert main(["student", str(tmp_path / "out"), "--notebooks", str(tmp_path)]) == 0
    assert "1 notebooks without solutions" in capsys.readouterr().out
    kept = ["student", str(tmp_path / "kept"), "--notebooks", str(tmp_path), "--solutions"]
    assert main(kept) == 0 and "1 notebooks with solutions" in capsys.readouterr().out
    assert "BEGIN SOLUTION" in (tmp_path / "kept" / "09_toy.ipynb").read_text(encoding="utf-8")


def test_answers_are_compared_as_a_person_would():
    import torch

    assert alike([1, 2], torch.tensor([1, 2])) and alike(range(2), [0, 1]) and alike((1.0,), [1])
    assert alike({1, 2}, {2, 1}) and alike([2, 1], {1, 2}) and alike({"a": [1]}, {"a": (1,)})
    assert alike(torch.tensor(1.0), 1.0 + 1e-7) and alike(float("nan"), 0.0) is False
    assert not alike([1, 2, 3], [1, 2]) and not alike(1, True) and not alike("1", 1) and not alike(None, 0)
    assert not alike(1e-12, 1e-9) and not alike({"a": 1}, {"b": 1}) and not alike(object(), 1)


def test_a_wrong_answer_is_told_what_is_wrong(capsys):
    ask = {"asked": "f(3)", "mistakes": {"That is the square.": 9}, "hint": "Add three times."}
    require_equal(6, 6, **ask)
    with pytest.raises(AssertionError, match=r"f\(3\): expected 6, got 9\. That is the square\."):
        require_equal(9, 6, **ask)
    with pytest.raises(AssertionError, match=r"expected 6, got 7\. Add three"):
        require_equal(7, 6, **ask)
    with pytest.raises(AssertionError, match=r"None.*return"):
        require_equal(None, 6, **ask)
    with pytest.raises(AssertionError, match=r"^words$"):
        require(False, "words")
    passed("9.1", "well done.")
    assert capsys.readouterr().out == "Exercise 9.1 is right: well done.\n"


def test_answers_are_shown_short():
    import torch

    assert shown(torch.arange(20.0)) == "[0, 1, 2, 3, 4, 5, 6, 7, …]"
    assert shown({"a": (1, 0.123456)}) == "{'a': [1, 0.1235]}"
    assert shown({2, 1}) == "{1, 2}" and shown(float("nan")) == "nan" and shown(range(2)) == "[0, 1]"


def test_the_machine_is_described(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path))
    lines = machine_report().splitlines()
    assert len(lines) == 5 and lines[0].startswith("Python 3.")
    assert re.search(r"still to be fetched|free for the cache", lines[3])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    assert machine_report().splitlines()[3].startswith("! 0.0 GiB free for the cache, 2 are wanted")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(blocked))
    assert machine_report().splitlines()[3].startswith("! the cache cannot be used")


def test_too_little_memory_is_said():
    assert memory_line(2.0).startswith("! 2.0 GiB of memory, 4 are wanted")
    assert memory_line(16.0) == "16 GiB of memory, enough" and "unknown" in memory_line(None)


def test_nbgrader_takes_the_same_parts_out():
    """Where nbgrader is installed (docs/instructors.md); it is no dependency, see docs/decisions.md."""
    preprocessors = pytest.importorskip("nbgrader.preprocessors")
    source = nbformat.reads(json.dumps(notebook()), as_version=4)
    checked, _ = preprocessors.CheckCellMetadata().preprocess(copy.deepcopy(source), {})
    cleared, _ = preprocessors.ClearSolutions().preprocess(checked, {})
    ours = student_version(notebook())
    theirs = [line for line in cleared.cells[3].source.splitlines() if "YOUR CODE HERE" not in line]
    assert theirs[:-1] == "".join(ours["cells"][3]["source"]).splitlines()[:-1]
    assert theirs[-1].strip() == "raise NotImplementedError()"
