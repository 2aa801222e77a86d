"""The study's bookkeeping: which cases, what is resumed, what the page says; not its figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("recovery_study", ROOT / "studies" / "recovery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["recovery_study"] = module
    spec.loader.exec_module(module)
    return module


def record(cut, text=None, perplexity=20.0, average=0.4, method=None):
    return {
        "cut": cut, "compensated": False, "method": method, "text": text, "perplexity": perplexity,
        "average": average, "conditions": "wikitext2 test", "seconds": 600.0, "tokens": 1000,
    }  # fmt: skip


def test_every_comparison_of_the_issue_is_a_case(study, tmp_path):
    asked = study.Study(tmp_path, tmp_path / "page.md")
    cases = asked.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.text for case in cases} >= {"self-generated", "c4", "books", "instructions", "wikitext2"}
    for compensated in (True, False):
        assert {c.method for c in cases if c.compensated is compensated and c.cut == "20 %"} >= set(
            study.METHODS
        )
    assert any(case.cut == "50 %" and case.method for case in cases)


def test_a_study_is_resumed_and_leaves_out_what_it_cannot_have(study, monkeypatch, tmp_path):
    asked = study.Study(tmp_path / "out", tmp_path / "docs" / "page.md")
    ran = []

    def run_case(bench, case):
        if case.text == "instructions":
            raise study.AssetError("no network")
        ran.append(case.name)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return record(case.cut, case.text, method=case.method)

    monkeypatch.setattr(study, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        study.run(asked)
    done = ran[:3]
    assert len(list((tmp_path / "out").glob("*.json"))) == 3
    records = study.run(asked)
    assert sorted(ran) == sorted([*done, *ran[3:]])
    assert len(ran) == len(set(ran)) + 1, "only the interrupted case ran twice"
    assert len(records) == len(asked.cases()) - 1
    page = (tmp_path / "docs" / "page.md").read_text()
    assert page.count("\n| ") == len(records) + 1
    assert f"{len(records)} of {len(asked.cases())} cases" in page


def test_goals_are_judged_on_text_that_is_not_wikitext(study):
    records = [
        record("dense", perplexity=20.0, average=0.4),
        record("20 %", "wikitext2", perplexity=15.0, average=0.4, method="full"),
        record("20 %", "c4", perplexity=23.0, average=0.39, method="full"),
        record("50 %", "c4", perplexity=60.0, average=0.30, method="full"),
    ]
    said = study.verdict(records)
    assert (
        "20 % fewer, perplexity: 1.150 × dense (20 % · plain · full · c4); the goal is 1.10: not met." in said
    )
    assert "20 % fewer, average: 0.975 × dense (20 % · plain · full · c4); the goal is 0.97: met." in said
    assert "50 % fewer, average: 0.750" in said
    assert "50 % fewer, perplexity" not in said
    assert "| 1.150 |" in study.table(records)
    assert json.dumps(records)
