"""``python docs/readme.py``: copy figure and summary of the executed notebook 05 into the README."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "05_evaluation.ipynb"
FIGURE = ROOT / "docs" / "figures" / "walkthrough.png"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- from notebooks/05_evaluation\.ipynb[^\n]*-->\n)(.*?)(\n\n)", re.DOTALL)


def outputs_of(source: str) -> list[dict]:
    """Outputs of the one cell whose source holds a text."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = [cell for cell in cells if cell["cell_type"] == "code" and source in "".join(cell["source"])]
    return cell["outputs"]


def figure() -> bytes:
    """The size–quality figure, as PNG."""
    shown = [output.get("data", {}) for output in outputs_of("plot_tradeoff(")]
    (picture,) = [data["image/png"] for data in shown if "image/png" in data]
    return base64.b64decode("".join(picture))


def summary() -> list[str]:
    """The lines on size and quality, without the one that names a folder."""
    text = "".join(line for output in outputs_of("summary_lines(summary)") for line in output["text"])
    return [line for line in text.splitlines() if not line.startswith("pruned model")]


def main() -> None:
    """Rewrite both."""
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_bytes(figure())
    text = "\n".join(f"    {line}" for line in summary())
    README.write_text(
        BLOCK.sub(lambda match: match[1] + text + match[3], README.read_text(encoding="utf-8")),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
