"""What the README shows is what the executed notebooks produced."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def source():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_and_figure_are_those_of_notebook_05():
    module = source()
    shown = module.BLOCK.search(TEXT)[2]
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in module.summary()]
    assert len(module.summary()) == 4
    assert module.FIGURE.read_bytes() == module.figure()


def test_the_first_command_comes_within_ten_lines():
    lines = TEXT.splitlines()[:10]
    assert any("make walkthrough" in line for line in lines)


def test_as_many_models_are_listed_as_promised():
    promised = int(re.search(r"lists (\d+) models", TEXT)[1])
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## ", page, flags=re.MULTILINE)) == promised


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", TEXT):
        assert f"\n{target}:" in makefile, target


def test_the_ten_lines_name_public_functions_only():
    import pruner_lib

    code = TEXT.split("```python")[1].split("```")[0]
    called = set(re.findall(r"\b([a-z_]+)\(", code)) - {"range"}
    assert called <= set(pruner_lib.__all__)
