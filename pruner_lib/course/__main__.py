"""``python -m pruner_lib.course``: student versions of the notebooks, or the list of exercises."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pruner_lib.course.exercises import CourseError
from pruner_lib.course.student import list_exercises, write_students


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pruner_lib.course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    student = commands.add_parser("student", help="write notebooks without solutions and outputs")
    student.add_argument("out", type=Path, help="folder to write them to")
    student.add_argument("--replace", action="store_true", help="write over notebooks that are there")
    student.add_argument("--solutions", action="store_true", help="keep the solutions, for nbgrader")
    listing = commands.add_parser("exercises", help="list number, title, difficulty and minutes")
    for command in (student, listing):
        command.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="their folder")
    return parser.parse_args(arguments)


def exercise_table(notebooks: Path) -> str:
    """All exercises as a Markdown table."""
    lines = ["| exercise | | difficulty | minutes |", "|---|---|---|---|"]
    for exercises in list_exercises(notebooks).values():
        for exercise in exercises:
            marks = "●" * exercise.difficulty + "○" * (3 - exercise.difficulty)
            lines.append(f"| {exercise.number} | {exercise.title} | {marks} | {exercise.minutes} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when all was written, 1 when not, with the reason."""
    options = _parse(arguments)
    try:
        if options.command == "exercises":
            print(exercise_table(options.notebooks))
            return 0
        written = write_students(
            options.notebooks, options.out, replace=options.replace, solutions=options.solutions
        )
    except (CourseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kept = "with" if options.solutions else "without"
    print(f"{len(written)} notebooks {kept} solutions are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
