"""Every notebook opened in JupyterLab and run from top to bottom; then each of its widgets is moved once.

The notebooks run on the real model with their own code, with smaller numbers in the cell of parameters (as
papermill would inject them) and a cache whose workspace is their own. nbval runs them at full size.
"""

from __future__ import annotations

import nbformat
import pytest
from lab_server import ROOT, running_lab
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import expect

from pruner_lib.assets.files import cache_folder

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Of these each notebook takes those that its cell of parameters has. Assertions must hold all the same.
SMALLER = {
    "num_windows": 12, "eval_windows": 8, "recovery_steps": 4, "teacher_steps": 4,
    "task_items": 4, "new_tokens": 8, "draft_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def course(browser, tmp_path_factory):
    """A lab with smaller copies of all notebooks."""
    home = tmp_path_factory.mktemp("course")
    cache = home / "cache"
    cache.mkdir()
    for entry in cache_folder().iterdir():
        if entry.name != "work":  # what the notebooks make from other parameters must not be found later
            (cache / entry.name).symlink_to(entry)
    with running_lab(home / "lab", {"PRUNER_LIB_CACHE": str(cache)}) as lab:
        for path in NOTEBOOKS:
            nbformat.write(smaller(load_notebook_node(str(path))), lab.folder / path.name)
        yield lab


def smaller(notebook):
    """The notebook with less to do."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    changed = {name: value for name, value in SMALLER.items() if f"\n{name} = " in f"\n{cell.source}"}
    copy = parameterize_notebook(notebook, changed) if changed else notebook
    copy.metadata.pop("papermill", None)
    return copy


def press_the_last_layer(panel):
    button = panel.locator(".widget-toggle-buttons").nth(1).get_by_role("button").last
    button.click()
    return f"layers.{button.inner_text().strip()}."


def move_the_slider(panel):
    panel.get_by_role("slider").first.press("ArrowRight")
    return "remain"


def remove_a_larger_share(panel):
    panel.get_by_role("slider").first.press("ArrowRight")
    return "lowest 30 %"


def type_a_prompt(panel):
    panel.get_by_role("slider").first.press("Home")  # as few tokens as there may be
    panel.get_by_label("Prompt").fill("Water is")
    panel.get_by_label("Prompt").press("Enter")
    return "Done"


def ask_for_ratios(panel):
    panel.get_by_role("button", name="ratio to the first").click()
    return "Ratios to"


# Widget to one thing that a person would do; it returns what must then be shown.
MOVES = {
    "groups": press_the_last_layer,
    "planner": move_the_slider,
    "criteria": remove_a_larger_share,
    "bench": type_a_prompt,
    "dashboard": ask_for_ratios,
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_its_widgets_answer(path, course, open_notebook):
    with open_notebook(course, path.name) as opened:
        check(opened)


def check(opened):
    """Run all, then move every widget."""
    opened.run_all()
    assert opened.errors() == []
    moved = 0
    for name, move in MOVES.items():
        for panel in opened.page.locator(f".pruner-lab-{name}").all():
            panel.scroll_into_view_if_needed()
            opened.settled(panel)
            status = panel.get_by_role("status")
            before = status.text_content()
            expected = move(panel)
            expect(status).not_to_have_text(before)
            expect(status).to_contain_text(expected)
            assert "Not possible" not in status.inner_text()
            opened.picture(f"{name}-{moved}", panel)
            moved += 1
    monitors = opened.page.locator(".pruner-lab-recovery").count()
    assert moved + monitors > 0, "every notebook has a widget"
