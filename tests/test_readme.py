"""What the README shows is what the executed notebooks produced."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import pruner_lib as pl
from pruner_lib.pruning.presets import PRESETS

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


def test_files_and_commands_that_contributors_are_told_of_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"\b(?:tests|studies|docs|data|pruner_lib)/[\w/]+\.\w+", text)
    assert len(files) > 5
    # NN stands for a notebook's number.
    missing = [name for name in files if not (ROOT / name.replace("_NN.", "_01.")).exists()]
    assert missing == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z]+)", text))
    assert [target for target in named if f"\n{target}:" not in makefile] == []
    for study in re.findall(r"`python (studies/\w+\.py)`", text):
        (folder,) = re.findall(
            r'study_parser\(.*, "(docs/\w+)", Study', (ROOT / study).read_text(encoding="utf-8")
        )
        assert f"`{folder}/study.md`" in text, f"{study} writes into {folder}"


@pytest.fixture
def names():
    """What the README's recipes use, with a tiny model for the real one."""
    from recovery_models import tiny_llama

    model = tiny_llama()
    ids = torch.randint(40, (96, 12), generator=torch.Generator().manual_seed(0))
    found = {name: getattr(pl, name) for name in pl.__all__}
    found |= {"model": model, "tokenizer": None, "dependencies": pl.discover(model), "text": ids}
    return found | {"load_calibration": lambda tokenizer, **asked: ids}


def recipe(number):
    return TEXT.split("```python")[number].split("```")[0]


def test_the_second_recipe_measures_no_family_that_it_does_not_plan(names):
    dependencies = names["dependencies"]
    assert "hidden_channel" in {family.kind for family in dependencies.families}
    exec(recipe(2), names)
    measured = {dependencies.family(name).kind for name in names["nats"]}
    assert measured == set(PRESETS["best"].kinds)
    plan = names["plan"]
    assert set(plan.removal) <= set(names["nats"]) and plan.params_after <= 0.8 * plan.params_before
    assert sum(p.numel() for p in names["pruned"].parameters()) == plan.params_after


@pytest.mark.parametrize("number", [1, 2])
def test_the_recipes_name_public_functions_only(number):
    called = set(re.findall(r"(?<!\.)\b([a-z_]+)\(", recipe(number))) - {"range"}
    assert called <= set(pl.__all__)
