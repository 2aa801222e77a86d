"""The committed notebooks as files: executed in order, of one anatomy. nbval runs them elsewhere."""

from __future__ import annotations

import ast
import copy
import re
import statistics
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SEQUENCE = (
    "00_start_here", "01_dependency_discovery", "02_importance", "03_pruning", "04_recovery", "05_evaluation",
    "06_your_own_model", "07_scaling", "08_beyond_the_paper",
)  # fmt: skip
# What one notebook leaves in the cache is used by the next only if it was made with the same values.
SHARED_PARAMETERS = ("model_name", "device", "ratio", "eval_windows", "recovery_text", "recovery_steps")
MACHINE = re.compile(r"/(?:home|root|Users|tmp|opt|usr)/|[A-Z]:\\\\")
WIDGET = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"\]\(([^)#:]+\.ipynb)[^)]*\)")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def prose(notebook):
    """Markdown of all cells, without code fences."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def execution_problems(notebook):
    """What is wrong with the way in which a notebook was executed, in words."""
    problems, last = [], 0
    for place, cell in enumerate(code_cells(notebook), start=1):
        count = cell.execution_count
        if count is None:
            problems.append(f"code cell {place} is not executed")
        elif count <= last:
            problems.append(f"code cell {place} ran as [{count}], not after [{last}]")
        last = count or last
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"code cell {place} ends in {output.ename}")
            elif output.get("name") == "stderr":
                problems.append(f"code cell {place} writes to standard error: {output.text[:80]!r}")
    return problems


def anatomy_problems(notebook):
    """What is missing or doubled, in words."""
    problems = []
    titles = re.findall(r"^# .+$", prose(notebook), flags=re.MULTILINE)
    if len(titles) != 1:
        problems.append(f"{len(titles)} first-level headings instead of one: {titles}")
    parameters = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(parameters) != 1:
        problems.append(f"{len(parameters)} cells tagged parameters instead of one")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("the kernel is not python3")
    return problems


def printed(cell):
    """All text in a cell's outputs."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


def parameter_values(notebook):
    """Name to default, read from the parameters cell."""
    (cell,) = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    return {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def test_the_walkthrough_is_complete():
    assert {path.stem for path in NOTEBOOKS} >= set(SEQUENCE)


@each_notebook
def test_executed_in_order_without_errors(path):
    assert execution_problems(nbformat.read(path, as_version=4)) == []


@each_notebook
def test_anatomy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert anatomy_problems(notebook) == []


@each_notebook
def test_cells_are_small_and_something_is_asserted(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert statistics.median(len(cell.source.splitlines()) for cell in cells) <= 6
    assert 25 <= len(nbformat.read(path, as_version=4).cells) <= 50
    assert any(isinstance(node, ast.Assert) for cell in cells for node in ast.walk(ast.parse(cell.source)))


@each_notebook
def test_widgets_are_shown_and_their_output_is_not_compared(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    widgets = [cell for cell in cells if any(WIDGET in output.get("data", {}) for output in cell.outputs)]
    assert widgets, "every notebook has a widget"
    for cell in widgets:
        assert re.match(r"(?:display|show)\(\w+\)", cell.source.splitlines()[-1]), cell.source
        assert "nbval-ignore-output" in tags(cell), cell.source


@each_notebook
def test_outputs_hold_no_path_of_a_machine(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert not MACHINE.search(printed(cell)), cell.source


@each_notebook
def test_parameters_name_model_and_device(path):
    values = parameter_values(nbformat.read(path, as_version=4))
    assert values["model_name"] is None and values["device"] is None


def test_notebooks_agree_on_shared_parameters():
    found = {name: set() for name in SHARED_PARAMETERS}
    for path in NOTEBOOKS:
        for name, value in parameter_values(nbformat.read(path, as_version=4)).items():
            found.get(name, set()).add(value)
    assert {name: values for name, values in found.items() if len(values) != 1} == {}


@each_notebook
def test_links_lead_to_notebooks_that_exist(path):
    links = LINK.findall(prose(nbformat.read(path, as_version=4)))
    assert links and [link for link in links if not (FOLDER / link).is_file()] == []


def toy(*cells, kernel="python3"):
    copies = [copy.deepcopy(cell) for cell in cells]
    for place, cell in enumerate(copies):
        cell["id"] = f"cell-{place}"
    notebook = nbformat.v4.new_notebook(cells=copies)
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel}
    return notebook


def ran(source, count, *outputs, tag=None):
    cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs))
    cell.metadata["tags"] = [tag] if tag else []
    return cell


def test_the_checks_find_bad_execution():
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    noise = nbformat.v4.new_output("stream", name="stderr", text="a warning")
    bad = toy(ran("a", 2), ran("b", 1), ran("c", None), ran("d", 3, error, noise))
    found = execution_problems(bad)
    assert [problem.split()[2] for problem in found] == ["2", "3", "4", "4"]
    assert "ValueError" in found[2] and "a warning" in found[3]
    assert execution_problems(toy(ran("a", 1), ran("b", 3))) == []


def test_the_checks_find_bad_anatomy():
    title = nbformat.v4.new_markdown_cell("# One\n\n```\n# a comment\n```")
    parameters = ran("model_name = None", 1, tag="parameters")
    assert anatomy_problems(toy(title, parameters)) == []
    assert len(anatomy_problems(toy(title, title, kernel="other"))) == 3
    assert len(anatomy_problems(toy(title, parameters, parameters))) == 1
