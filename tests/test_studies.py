"""The studies' bookkeeping: which cases, what is resumed, what the page says; not their figures."""

import importlib
import json
from pathlib import Path

import pytest

from pruner_lib.assets import AssetError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))


@pytest.fixture
def study():
    return importlib.import_module("recovery")


@pytest.fixture
def asked(study, tmp_path):
    return study.Study(tmp_path / "records.json", tmp_path / "docs" / "page.md", tmp_path / "models")


def record(cut, text=None, perplexity=20.0, average=0.4, method=None, screen=False):
    return {
        "cut": cut, "compensated": False, "method": method, "text": text, "perplexity": perplexity,
        "average": average, "conditions": "wikitext2 test", "seconds": 600.0, "tokens": 1000,
        "screen": screen, "machine": "two threads",
    }  # fmt: skip


def test_every_comparison_of_the_issue_is_a_case(study):
    cases = study.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.text for case in cases} >= {
        study.MIXED,
        "self-generated",
        "c4",
        "books",
        "instructions",
        "wikitext2",
    }
    for compensated in (True, False):
        methods = {c.method for c in cases if c.compensated is compensated and c.cut == "20 %"}
        assert methods >= set(study.METHODS) | {None}
    assert any(case.cut == "50 %" and case.method for case in cases)


def test_a_study_is_resumed_and_leaves_out_what_it_cannot_have(study, asked, monkeypatch):
    ran = []

    def run_case(bench, case):
        if case.text == "instructions":
            raise AssetError("no network")
        ran.append(case.name)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return record(case.cut, case.text, method=case.method, screen=case.screen)

    monkeypatch.setattr(study, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        study.run(asked)
    assert list(json.loads(asked.records.read_text())["records"]) == ran[:3]
    records = study.run(asked)
    assert len(ran) == len(set(ran)) + 1, "only the interrupted case ran twice"
    assert len(records) == len(study.cases()) - 1
    page = asked.page.read_text()
    assert page.count("\n| ") == len(records) + 2  # and the heads of two tables
    assert f"{len(records)} of {len(study.cases())} cases" in page
    asked.page.unlink()
    assert study.run(asked, "50 %") == records
    assert asked.page.read_text() == page, "a part of the cases leaves the others in the page"


def test_figures_of_other_settings_are_not_mixed(study, asked, monkeypatch):
    monkeypatch.setattr(study, "run_case", lambda bench, case: record(case.cut, screen=case.screen))
    study.run(asked, "dense")
    longer = study.Study(asked.records, asked.page, asked.models, minutes=20)
    with pytest.raises(ValueError, match=r"begun with minutes 10\.0, now 20.*--records"):
        study.run(longer)
    assert importlib.import_module("records").machine() in asked.records.read_text()


def test_goals_are_judged_on_text_that_is_not_wikitext(study):
    records = [
        record("dense", perplexity=20.0, average=0.4),
        record("dense", "c4", perplexity=9.0, method="full", screen=True),  # no measure of the others
        record("dense", perplexity=10.0, screen=True),
        record("20 %", "wikitext2", perplexity=15.0, average=0.4, method="full"),
        record("20 %", "c4", perplexity=23.0, average=0.39, method="full"),
        record("20 %", "c4", perplexity=12.0, average=0.41, method="full", screen=True),
        record("50 %", "c4", perplexity=60.0, average=0.30, method="full"),
    ]
    said = study.verdict(records)
    case = "(20 % · plain · full · c4, 10.0 minutes)"
    assert f"20 % fewer, perplexity: 1.150 × dense {case}; the goal is 1.10: not met." in said
    assert f"20 % fewer, average: 0.975 × dense {case}; the goal is 0.97: met." in said
    assert "50 % fewer, average: 0.750" in said
    assert "50 % fewer, perplexity" not in said
    assert "| 1.150 |" in study.table(records)
    assert "| 1.200 |" in study.table(records), "short tests are compared with a short test"


def test_the_quality_study_varies_what_the_issue_asks_for(monkeypatch, tmp_path):
    quality = importlib.import_module("quality")
    cases = quality.cases()
    assert len({case.name for case in cases}) == len(cases)
    best = [case for case in cases if "nats" in case.scope and case.criterion == quality.BEST.criterion]
    assert {case.cut for case in best} >= set(quality.SHARES)
    assert {case.seed for case in best} == {0, 1, 2}
    assert {case.calibration for case in best} == {"wikitext2", "c4", "books", quality.MIXED}
    assert {case.what for case in best} == {"heads, neurons", "blocks", "blocks, neurons"}
    criteria = ("taylor_first", "taylor_second", "wanda", "fluctuation", "l2", "random")
    for scope in ("local", "global"):
        compared = {(c.criterion, c.compensation) for c in cases if c.scope == scope and c.cut == "20 %"}
        assert compared >= {(criterion, fit) for criterion in criteria for fit in (None, "ridge")}
    fitted = {case.criterion for case in cases if case.scope == "fitted nats"}
    assert fitted >= {"wanda", "taylor_first", "random"}

    def run_case(bench, case):
        perplexity = {"wikitext2, 128": 50.0 if case.cut == "dense" else 80.0}
        return {**vars(case), "params": 90, "dense_params": 100, "perplexity": perplexity}

    monkeypatch.setattr(quality, "run_case", run_case)
    study = quality.Study(tmp_path / "records.json", tmp_path / "page.md")
    assert len(quality.run(study, "^dense$")) == 1
    assert len(quality.run(study, "^20 % · wanda · nats · heads, neurons · (plain|ridge) · wiki.* 0$")) == 3
    page = (tmp_path / "page.md").read_text()
    assert f"3 of {len(cases)} cases" in page and "80.0 (1.60 ×)" in page and "0.9000" in page
