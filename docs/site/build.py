"""``python docs/site/build.py``: every notebook and every page of ``docs/`` as one static site with search.

Sphinx renders what the notebooks hold; no kernel runs and nothing is fetched, now or when a page is read.
A warning (a broken link, a missing image, a heading out of order) fails the build.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_STATIC = (
    "<p class='interactive'><b>Interactive.</b> The controls of this cell need a running notebook: "
    "<code>make lab</code> opens it.</p>"
)


def stage(target: Path) -> None:
    """Copy what the site is made of, laid out as in the repository, so that links between pages hold.

    Args:
        target: an empty folder.
    """
    here = Path(__file__).parent
    for name in ("conf.py", "index.md"):
        shutil.copy(here / name, target)
    shutil.copytree(here / "static", target / "static")
    shutil.copy(ROOT / "CONTRIBUTING.md", target)
    unwanted = shutil.ignore_patterns("site", "__pycache__", "*.py", "*.json")
    shutil.copytree(ROOT / "docs", target / "docs", ignore=unwanted)
    (target / "notebooks").mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = for_reading(nbformat.read(path, as_version=4))
        nbformat.write(notebook, target / "notebooks" / path.name)


def for_reading(notebook: Any) -> Any:
    """A copy of a notebook for a page without a kernel.

    Widgets become a note, figures get the sentence printed after them as alternative text, and solutions
    of exercises are folded.
    """
    copied = nbformat.from_dict(notebook)
    copied.metadata.pop("widgets", None)
    cells = copied.cells
    for place, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.metadata.tags = sorted({*cell.metadata.get("tags", []), "hide-input"})
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                output.data = {"text/html": NOT_STATIC}
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            said = next(_sentences(cells[place:]), None)
            cell.metadata.mystnb = {"image": {"alt": said or "figure of the cell above"}}
    return copied


def _sentences(cells: Sequence[Any]) -> Iterator[str]:
    """What the first cells print, up to and with the code cell after the first."""
    for cell in [cell for cell in cells if cell.cell_type == "code"][:2]:
        for output in cell.outputs:
            if output.output_type == "stream" and output.text.strip():
                yield " ".join(output.text.split()).replace('"', "'")


def build(output: Path, *, quiet: bool = False) -> int:
    """Stage and render.

    Args:
        output: folder of the site; replaced.
        quiet: print warnings only.

    Returns:
        Sphinx's exit status: 0 when there was no warning.
    """
    from sphinx.cmd.build import main as sphinx

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        stage(source)
        made = Path(folder) / "html"
        arguments = ["-b", "html", "-W", "--keep-going", "-E", "-d", str(Path(folder) / "trees")]
        status = sphinx([*arguments, *(["-q"] if quiet else []), str(source), str(made)])
        if status == 0:
            shutil.rmtree(output, ignore_errors=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, output)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the site was built without a warning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "site", help="default: %(default)s")
    options = parser.parse_args(arguments)
    status = build(options.output)
    if status == 0:
        print(f"open {options.output / 'index.html'} in a browser; the folder can be served as it is")
    return status


if __name__ == "__main__":
    sys.exit(main())
