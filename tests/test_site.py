"""The site is built without a warning, holds a page for every notebook, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "site"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", SOURCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, built once as `make site` builds it."""
    output = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, str(SOURCE / "build.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def test_no_broken_link_and_no_missing_image(site):
    """Sphinx's warnings are errors; here what a browser would miss, in every page that was written."""
    pages = list(site.rglob("*.html"))
    missing = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'(?:href|src)="([^"#?]+)', text):
            if not re.match(r"https?:|data:|mailto:", target) and not (page.parent / target).exists():
                missing.add(f"{page.name}: {target}")
    assert len(pages) > len(NOTEBOOKS) and missing == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_a_page_with_its_figures(site, path):
    text = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    title = re.match(r"# (.+)", notebook.cells[0].source)[1]
    assert re.sub(r"[^\w ]", "", title)[:40] in re.sub(r"<[^>]+>|[^\w <>/]", "", text)
    figures = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    described = re.findall(r'<img alt="([^"]+)"[^>]* src="\.\./_images/', text)
    assert len(described) == len(figures)
    assert len(re.findall(r"<h1[ >]", text)) == 1


def test_pages_fetch_nothing_from_elsewhere(site):
    """Scripts, styles, images and fonts are all in the folder; only links lead out."""
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        outside = re.findall(
            r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+|url\(\s*["\']?http', text
        )
        assert outside == [], page


def test_search_finds_words_of_the_notebooks(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.stem}" in index for path in NOTEBOOKS)
    assert '"perplex' in index or "perplex:" in index
    assert (site / "search.html").is_file()


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "notebooks" / "02_importance.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 5 and not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE)
    half = re.search(r"<mfrac[^>]*>\s*<mn>(\d+)</mn>\s*<mn>(\d+)</mn>\s*</mfrac>", text)
    assert half and half.groups() == ("1", "2")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"\tfrac12 w", r"\tfrac{1}{2} w"), (r"\frac1N", r"\frac{1}{N}"), (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\Big|x\Big|", "|x|"), (r"\bigl(x\bigr)", r"\bigl(x\bigr)"), (r"\bigcup", r"\bigcup"),
    ],
)  # fmt: skip
def test_formulas_are_spelled_out_for_docutils(written, read):
    assert load("conf").spelled_out(written) == read


def cell(source, *outputs, **metadata):
    made = nbformat.v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)
    made.execution_count = 1
    return made


def shown(**data):
    return nbformat.v4.new_output(
        "display_data", data={key.replace("_", "/"): value for key, value in data.items()}
    )


def said(text):
    return nbformat.v4.new_output("stream", text=text)


def test_widgets_become_notes_and_figures_get_the_sentence_after_them():
    build = load("build")
    widget = nbformat.v4.new_output("display_data", data={build.WIDGET: {}, "text/plain": "Explorer(…)"})
    notebook = nbformat.v4.new_notebook(
        cells=[
            cell("plot()", shown(image_png="iVBORw0KGgo=")), nbformat.v4.new_markdown_cell("between"),
            cell("print()", said('The figure: "bars"\nfall\n')), cell("display(w)", widget),
            cell("alone()", shown(image_png="iVBORw0KGgo=")), cell("pass"),
            cell("def f(): ...", nbgrader={"solution": True}, tags=["hide-input"]),
        ]
    )  # fmt: skip
    notebook.metadata["widgets"] = {"state": {}}
    before = nbformat.writes(notebook)
    first, _, _, fourth, fifth, _, last = build.for_reading(notebook).cells
    assert first.metadata.mystnb.image.alt == "The figure: 'bars' fall"
    assert fifth.metadata.mystnb.image.alt == "figure of the cell above"
    assert list(fourth.outputs[0].data) == ["text/html"] and "make lab" in fourth.outputs[0].data["text/html"]
    assert last.metadata.tags == ["hide-input"]
    assert nbformat.writes(notebook) == before, "the given notebook is left as it is"


def test_a_broken_link_fails_the_build(tmp_path, monkeypatch, capfd):
    build = load("build")

    def stage(target):
        (target / "index.md").write_text("# One page\n\n[nowhere](nowhere.md)\n")
        for name in ("conf.py", "static"):
            (target / name).symlink_to(SOURCE / name)

    monkeypatch.setattr(build, "stage", stage)
    assert build.build(tmp_path / "site", quiet=True) != 0
    assert "nowhere" in capfd.readouterr().err and not (tmp_path / "site").exists()
