"""The study and the benchmark, on tiny models."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from importance_oracle import tiny_gpt2, tiny_llama, tokens_of

from pruner_lib.discovery import discover
from pruner_lib.importance import CRITERIA, REDUCTIONS, benchmark, estimate_importance, loss_changes
from pruner_lib.importance.calibration import mean_loss
from pruner_lib.importance.study import (
    Study,
    StudySettings,
    measure_estimates,
    measure_removals,
    measure_truth,
    run_study,
)
from pruner_lib.importance.study_report import (
    DEFAULT,
    MEASURES,
    VIEWS,
    Verdict,
    _places,
    judge,
    reliability,
    shown_criteria,
    verdicts,
)

SETTINGS = StudySettings(
    layers=(0, 1), neurons=5, truth_samples=4, truth_seq_len=7, sources=("books", "c4"), seeds=(0,),
    sizes=(1, 3), seq_len=7,
)  # fmt: skip


def draw(*, source, split, num_samples, seq_len, seed):
    return tokens_of(5, seq_len, seed=100 * seed + len(source) + len(split))[:num_samples]


@pytest.fixture
def study(tmp_path):
    model = tiny_llama()
    return Study(model, discover(model), draw, SETTINGS, tmp_path / "work")


def test_estimates_in_one_pass_are_those_of_estimate_importance(tmp_path):
    model = tiny_gpt2()  # float64 throughout
    study = Study(model, discover(model), draw, SETTINGS, tmp_path)
    (source, seed, found), *_ = measure_estimates(study)
    families = study.families()
    scored = found["scores"]
    assert set(scored) == {"1", "3"} and set(scored["3"]) == set(found["lowest"]) == set(CRITERIA)
    for size in (1, 3):
        tokens = draw(source=source, split="train", num_samples=size, seq_len=7, seed=seed)
        for criterion in CRITERIA:
            reductions = ["none"] if criterion == "random" else list(REDUCTIONS)
            assert list(scored[str(size)][criterion]) == reductions
            for reduction in ("none",) if criterion == "random" else ("sum", "last"):
                options = {"reduction": "sum" if reduction == "none" else reduction, "seed": seed}
                scores = estimate_importance(
                    model, study.dependencies, tokens, criterion=criterion, families=list(families), **options
                )
                for name, (_, groups) in families.items():
                    mine = torch.tensor(scored[str(size)][criterion][reduction][name], dtype=torch.float64)
                    torch.testing.assert_close(mine, scores[name][groups], rtol=1e-5, atol=0)
                if size == 3:
                    name = "layers.1.mlp_neuron"  # a quarter of all 48, not of the five measured
                    lowest = scores[name].argsort(stable=True)[:12]
                    assert found["lowest"][criterion][reduction][name] == sorted(lowest.tolist())


def test_truth_is_measured_per_half(study):
    truth = measure_truth(study)
    assert {name.split(".")[-1] for name in truth} == {"attention_head", "query_head", "mlp_neuron"}
    halves = draw(source="wikitext2", split="validation", num_samples=4, seq_len=7, seed=0).chunk(2)
    _, groups = study.families()["layers.1.mlp_neuron"]
    assert len(groups) == 5 and groups == sorted(set(groups))
    for half, found in zip(halves, truth["layers.1.mlp_neuron"], strict=True):
        expected = loss_changes(study.model, study.dependencies, half, "layers.1.mlp_neuron", groups)
        assert found == expected.tolist()


def test_a_quarter_of_all_judged_families_goes_at_once(study):
    lowest = {
        "l1": {"sum": {"layers.0.mlp_neuron": [1, 4, 7], "layers.1.mlp_neuron": [0, 2, 3]}},
        "l2": {"max": {"layers.0.attention_head": [2], "layers.1.attention_head": [0]}},
    }
    found = measure_removals(study, {("books", 0): lowest, ("c4", 0): lowest})
    tokens = draw(source="wikitext2", split="validation", num_samples=4, seq_len=7, seed=0)[:2]
    dense = mean_loss(study.model.eval(), [tokens])
    for name, by_kind in (("l1", "mlp_neuron"), ("l2", "attention_head")):
        ((reduction, removal),) = lowest[name].items()
        zeroed = study.dependencies.zero(study.model, removal)
        change = mean_loss(zeroed, [tokens]) - dense
        assert abs(change) > 1e-6
        assert found["books"][name] == {reduction: {by_kind: pytest.approx(change, rel=1e-9)}}
    assert found["c4"] == found["books"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that ran to its end, and its page."""
    folder = tmp_path_factory.mktemp("study")
    model = tiny_llama()
    study = Study(model, discover(model), draw, SETTINGS, folder / "work")
    return study, run_study(study, folder / "out")


def test_the_page_has_every_combination_and_says_what_the_default_is_worth(finished):
    study, page = finished
    text = page.read_text()
    for criterion in CRITERIA:
        for reduction in ["none"] if criterion == "random" else REDUCTIONS:
            assert text.count(f"\n| {criterion} | {reduction} | ") == 3  # neurons, query heads, heads
    for kind in ("neurons", "query heads", "heads"):
        for measure in MEASURES:
            assert text.count(f"\n| {kind} | {measure.words} | ") == 1
    assert "default (taylor_second, sum)" in text and "The default has " in text
    for source in SETTINGS.sources:
        for view in VIEWS.values():
            assert text.count(f"\n| {source} | {view} | ") == 1
    for figure in ("study_criteria.svg", "study_samples.svg"):
        assert figure in text and (page.parent / figure).read_text().rstrip().endswith("</svg>")
        assert (page.parent / figure).stat().st_size < 200_000
    pieces = sorted(path.name for path in study.work.rglob("*.json"))
    assert len(pieces) == len(study.families()) + 2 + 2  # truth, estimates, removals


def test_a_stopped_study_goes_on_and_another_one_starts_anew(finished, tmp_path, monkeypatch):
    done, page = finished
    first, made = page.read_text(), []
    shutil.copytree(done.work, tmp_path / "work")
    study = replace(done, work=tmp_path / "work")
    monkeypatch.setattr("pruner_lib.importance.study.loss_changes", lambda *a, **k: made.append(a))
    (study.work / "truth" / "layers.0.mlp_neuron.json").unlink()
    with pytest.raises(AttributeError):  # the one missing piece is made again, by the stand-in
        run_study(study, page.parent)
    assert len(made) == 1 and page.read_text() == first
    other = replace(study, settings=StudySettings((0,)))
    assert other.piece("truth/layers.1.mlp_neuron", lambda: "new") == "new"


def test_judging_by_hand():
    rising, falling = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    truth = {"layers.0.mlp_neuron": [rising, rising], "layers.1.mlp_neuron": [falling, falling]}
    estimate = {"layers.0.mlp_neuron": rising, "layers.1.mlp_neuron": rising}
    # right in one layer, reversed in the other
    assert judge("mlp_neuron", estimate, truth, "change") == (0.0, 0.5)
    heads = {"layers.0.attention_head": [[1.0, 2.0]] * 2, "layers.1.attention_head": [[3.0, 4.0]] * 2}
    pooled = {"layers.0.attention_head": [1.0, 2.0], "layers.1.attention_head": [0.3, 0.4]}
    # ranks 0 1 2 3 against 2 3 0 1: 1 - 6·16/60
    assert judge("attention_head", pooled, heads, "change")[0] == pytest.approx(-0.6)
    assert reliability("mlp_neuron", truth, "change") == pytest.approx(1)


def test_size_forgets_the_sign():
    truth = {"layers.0.mlp_neuron": [[-9.0, 1.0, 2.0, -3.0], [-7.0, 1.0, 2.0, 3.2]]}
    knows_sizes, knows_signs = (
        {"layers.0.mlp_neuron": v} for v in ([9.0, 2.0, 3.0, 1.0], [0.0, 2.0, 3.0, 1.0])
    )
    # means of the halves: -8, 1, 2, 0.1
    assert judge("mlp_neuron", knows_sizes, truth, "size") == (1, 1)
    assert judge("mlp_neuron", knows_signs, truth, "change") == (1, 1)
    assert judge("mlp_neuron", knows_sizes, truth, "change")[0] < 0.5
    # the halves' ranks 0 2 3 1 and 0 1 2 3 with the sign, 3 0 1 2 and 3 0 1 2 without
    assert reliability("mlp_neuron", truth, "size") == pytest.approx(1)
    rho = 1 - 6 * (1 + 1 + 4) / 60
    assert reliability("mlp_neuron", truth, "change") == pytest.approx((2 * rho / (1 + rho)) ** 0.5)


def test_a_verdict_averages_draws_and_places_count_the_best_first():
    truth = {"layers.0.mlp_neuron": [[1.0, 2.0, 3.0, 4.0]] * 2}
    right, wrong = ({"layers.0.mlp_neuron": v} for v in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]))
    estimates = {
        ("books", 0): {"8": {"l1": {"sum": right}, "l2": {"sum": right}}},
        ("c4", 0): {"8": {"l1": {"sum": right}, "l2": {"sum": wrong}}},
    }
    removals = {
        source: {"l1": {"sum": {"mlp_neuron": rise}}, "l2": {"sum": {"mlp_neuron": 0.1}}}
        for source, rise in (("books", 0.2), ("c4", 0.4))
    }
    found = verdicts("mlp_neuron", truth, estimates, removals, "8")
    assert found["l1", "sum"] == Verdict((1, 1), (1, 1), (0, 0), pytest.approx(0.3))
    assert found["l2", "sum"] == Verdict((0, 0.5), (0, 0.5), (1, 1), pytest.approx(0.1))
    rows = [line.split(" | ") for line in _places({"mlp_neuron": {**found, DEFAULT: found["l2", "sum"]}})]
    best = {row[1]: row[2:] for row in rows if row[0] == "| neurons"}
    # l1 knows the groups, l2's removal costs less
    assert best["Spearman with the loss change"] == ["l1, sum", "1.000", "0.000", "3 of 3 |"]
    assert best["Spearman with its size"] == ["l1, sum", "1.000", "0.000", "3 of 3 |"]
    assert best["loss rise, a share at once"] == ["l2, sum", "0.100", "0.100", "2 of 3 |"]
    assert shown_criteria(found) == []  # weights alone read no text


def test_settings_say_what_is_wrong():
    assert StudySettings.full(30).layers == (1, 6, 12, 17, 23, 28)
    with pytest.raises(ValueError, match="sizes must rise"):
        StudySettings((0,), sizes=(4, 4))
    with pytest.raises(ValueError, match="must be even"):
        StudySettings((0,), truth_samples=3)
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1"):
        StudySettings((0,), ratio=25)
    with pytest.raises(ValueError, match="must each name something"):
        StudySettings(())


def test_benchmark_measures_time_and_memory(tmp_path):
    model = tiny_llama(intermediate_size=4000).float()  # weights many times the activations
    measured = benchmark.measure(model, discover(model), tokens_of(1, 2), repeats=1)
    rows = json.loads(json.dumps(measured))["cases"]
    assert rows["forward"]["ratio"] == rows["forward + backward"]["ratio"] == 1
    # Training keeps all gradients at once; scoring frees each as it comes.
    kept, freed = rows["forward + backward"], rows["taylor_first, heads and neurons"]
    assert kept["extra_share"] > 0.5 > freed["extra_share"]
    page = benchmark.as_markdown(measured, "tiny")
    assert all(f"| {name} | " in page for name in rows)


def test_peak_bytes_counts_what_is_held_at_once():
    def run():
        first = torch.ones(1 << 18)  # 1 MiB
        second = first * 2
        del first
        return second + 1

    assert 2 * 2**20 <= benchmark.peak_bytes(run, torch.device("cpu")) < 2.2 * 2**20
