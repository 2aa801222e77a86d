"""How Sphinx renders the site; ``build.py`` lays out what it reads."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml

project = "Pruner Lab"
html_title = "Pruner Lab"
language = "en"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}  # widgets are staged as notes; nothing comes from other sites
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"


def show_inline(self: Any, node: nodes.math) -> None:
    """A formula inside a line."""
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def show_block(self: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    self.body.append(f'<div class="math">{_mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def spelled_out(formula: str) -> str:
    """LaTeX as docutils reads it rightly.

    Fences of a given size go, since those of MathML grow by themselves; 1/2 written without braces gets them,
    since docutils would read the number twelve.
    """
    formula = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", formula.strip())
    return re.sub(r"(\\[dt]?frac)\s*(\d)\s*([\da-zA-Z])", r"\1{\2}{\3}", formula)


def _mathml(node: nodes.Element, *, block: bool) -> str:
    """MathML, which browsers draw themselves: no script, no fonts, no other site."""
    formula = spelled_out(node.astext())
    try:
        return str(latex2mathml.tex2mathml(formula, as_block=block))
    except MathError as error:
        raise ValueError(
            f"formula that docutils cannot turn into MathML: {node.astext()}: {error}"
        ) from error


def setup(app: Any) -> None:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (show_inline, None), (show_block, None))
