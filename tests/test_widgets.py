"""Widgets: set what a person would set, and read what they then show."""

from __future__ import annotations

import re
import time

import ipywidgets
import pytest
import torch
from harness_data import byte_tokenizer
from recovery_models import tiny_llama

import pruner_lib as pl
from pruner_lib import display
from pruner_lib.checkpoint import compatibility
from pruner_lib.importance import ImportanceScores
from pruner_lib.importance.grading import grade

NEURONS = "layers.1.mlp_neuron"


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def dependencies(model):
    return pl.discover(model)


@pytest.fixture(scope="module")
def batches():
    return torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def scores(model, dependencies, batches):
    return {
        "l2": pl.estimate_importance(model, dependencies, None, criterion="l2"),
        "taylor": pl.estimate_importance(
            model, dependencies, batches, criterion="taylor_first", source="noise"
        ),
        "largest": pl.estimate_importance(
            model, dependencies, batches, criterion="taylor_first", reduction="max", source="noise"
        ),
    }


def controls(widget):
    """Every control inside a widget, however deep."""
    for child in getattr(widget, "children", ()):
        yield from controls(child)
        if hasattr(child, "description") and not isinstance(child, ipywidgets.HTML | ipywidgets.Label):
            yield child


def plain(html):
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


# ---- explorer ------------------------------------------------------------------------------------------


def test_explorer_lights_the_slices_of_the_chosen_group(dependencies):
    explorer = display.group_explorer(dependencies)
    explorer.index.value = 5
    assert "layers.0.mlp_neuron, group 5 of 24" in explorer.text.value
    assert re.findall(r"<br>(row|column) 5<", explorer.picture.value) == ["row", "row", "column"]
    before = explorer.picture.value
    explorer.layer.value = 1
    assert explorer.family.name == NEURONS and "layers.1.mlp_neuron" in explorer.text.value
    explorer.kind.value = "attention_head"
    assert explorer.index.max == 1 and explorer.index.value == 1, "two KV heads; the last one is left chosen"
    assert "rows 8 to 15" in explorer.picture.value and explorer.picture.value != before
    explorer.kind.value = "hidden_channel"
    assert explorer.layer.layout.display == "none" and explorer.picture.value.count("<svg") == 8
    assert "… and 13 more" in explorer.picture.value
    explorer.kind.value = "qk_channel"
    assert "cannot be cut" in explorer.text.value


@pytest.mark.parametrize(
    ("kind", "click", "group"),
    [("mlp_neuron", "0:0.99", 23), ("mlp_neuron", "2:0.0", 0), ("attention_head", "3:0.6", 1)],
)
def test_a_click_on_a_drawn_matrix_chooses_its_group(dependencies, kind, click, group):
    explorer = display.group_explorer(dependencies)
    explorer.kind.value = kind
    explorer.picked.value = click
    assert explorer.index.value == group
    assert explorer.picked.value == "", "the same place can be clicked again"


def test_explorer_lists_the_operators_and_asks_once_per_family(dependencies, monkeypatch):
    asked, said = [], []
    original = type(dependencies).explain
    monkeypatch.setattr(
        type(dependencies), "explain", lambda self, *a: asked.append(a[0]) or original(self, *a)
    )
    explorer = display.group_explorer(dependencies)
    explorer.text.observe(lambda change: said.append(change["new"]), names="value")
    explorer.why.value = True
    assert "Running the model once" in said[0], "waiting is announced"
    shown = plain(explorer.text.value)
    assert re.search(
        r"mlp\.up_proj mm \(model\.layers\.0\.mlp\.down_proj\) → mul \(model\.layers\.0\.mlp\)", shown
    ), shown
    assert "mlp.down_proj (start here)" in shown
    explorer.index.value = 7
    explorer.layer.value = 1
    explorer.layer.value = 0
    assert len(asked) == 2, "one question per family, remembered"


def test_a_layer_without_the_kind_is_said(dependencies):
    from dataclasses import replace

    families = tuple(family for family in dependencies.families if family.name != NEURONS)
    explorer = display.group_explorer(replace(dependencies, families=families))
    explorer.layer.value = 1
    assert "layer 1 has no mlp_neuron; layers 0 have" in explorer.text.value
    assert explorer.picture.value == ""


# ---- planner -------------------------------------------------------------------------------------------


@pytest.fixture
def planner(model, dependencies, scores):
    return display.plan_explorer(model, dependencies, scores["taylor"])


def test_planner_shows_what_the_plan_will_leave(planner, model):
    assert planner.plan.params_after == planner.cost.params < planner.plan.params_before
    planner.amount.value = 0.5
    cut = pl.prune(model, planner.plan)
    assert planner.cost == pl.count_cost(cut)
    assert planner.formats == compatibility(cut)
    shown = plain(planner.text.value)
    assert f"{planner.plan.params_after:,} of {planner.plan.params_before:,} remain" in shown
    assert planner.picture.value.count('class="kept"') == 2, "one bar per layer"
    assert plain(planner.compatible.value).startswith("What will open it transformers ✔ yes")


def test_planner_follows_every_control(planner):
    seen = {planner.plan.removal and str(dict(planner.plan.removal))}
    for control, value in (
        ("amount", 0.5), ("kinds", ("mlp_neuron",)), ("layers", (1, 1)), ("scope", "global"), ("round_to", 8),
    ):  # fmt: skip
        getattr(planner, control).value = value
        assert planner.plan is not None, planner.text.value
        seen.add(str(dict(planner.plan.removal)))
    assert len(seen) >= 4, "scope alone may leave one family's plan as it is"
    assert set(planner.plan.removal) == {NEURONS} and planner.plan.kept_sizes[NEURONS] % 8 == 0
    assert plain(planner.compatible.value).startswith("What will open it transformers ✘ no")


@pytest.mark.parametrize(
    ("goal", "attribute"),
    [("parameters", "params"), ("multiply-accumulates", "macs"), ("bytes", "weight_bytes")],
)
def test_planner_meets_targets(planner, goal, attribute):
    dense = getattr(planner._cost.dense, attribute)
    planner.goal.value = goal
    assert planner.amount.description == "Share that stays" and planner.amount.value == 0.75
    planner.amount.value = 0.9
    assert 0.85 * dense < getattr(planner.cost, attribute) <= 0.9 * dense
    planner.goal.value = "ratio of groups"
    assert planner.amount.description == "Ratio removed" and planner.amount.value == pytest.approx(0.1)


def test_planner_says_why_not_and_recovers(planner):
    planner.kinds.value = ()
    assert "Not possible:" in planner.text.value and planner.plan is None
    assert planner.picture.value == planner.compatible.value == "", "nothing old stays on the screen"
    planner.kinds.value = ("mlp_neuron",)
    assert planner.plan is not None and "Not possible" not in planner.text.value
    planner.uniform.value = True
    planner.layers.value = (1, 1)
    assert "uniform=True keeps one width in every layer" in planner.text.value


def test_planner_begins_with_the_layers_that_have_scores(model, dependencies, scores):
    some = ImportanceScores({NEURONS: scores["l2"][NEURONS]})
    planner = display.plan_explorer(model, dependencies, some)
    assert planner.layers.value == (1, 1) and set(planner.plan.removal) == {NEURONS}
    planner.layers.value = (0, 1)
    assert "Not possible" in planner.text.value and "layers.0.mlp_neuron" in planner.text.value


def test_planner_touches_no_model(planner, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planner.amount.value = 0.6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.real_model
@pytest.mark.parametrize("goal", ["ratio of groups", "parameters", "multiply-accumulates"])
def test_a_move_of_the_planner_takes_less_than_200_ms(default_model, goal):
    model, _ = default_model
    dependencies = pl.discover(model)
    planner = display.plan_explorer(
        model, dependencies, pl.estimate_importance(model, dependencies, None, criterion="l2")
    )
    planner.goal.value = goal
    times = []
    for place in range(7):
        start = time.process_time()
        planner.amount.value = 0.55 + 0.05 * place
        times.append(time.process_time() - start)
    assert planner.plan is not None
    assert sorted(times)[len(times) // 2] < 0.2, times


# ---- criteria ------------------------------------------------------------------------------------------


def test_criteria_compares_ranks_and_overlap(scores):
    lab = display.criteria_explorer(scores)
    assert lab.first.value == ("l2", "sum", "none")
    assert lab.second.value == ("taylor_first", "max", "noise, 4 × 12")
    lab.family.value, lab.ratio.value = NEURONS, 0.5
    assert lab.overlap == display.lowest_overlap(scores["l2"], scores["largest"], NEURONS, 0.5)
    shown = plain(lab.text.value)
    lowest = ", ".join(map(str, scores["l2"][NEURONS].argsort(stable=True)[:6].tolist()))
    assert f"agree on {100 * lab.overlap:.0f} % of the lowest 50 %" in shown and f"{lowest} …" in shown
    before = lab.picture.value
    lab.second.reduction.value = "sum"
    assert lab.second.value == ("taylor_first", "sum", "noise, 4 × 12") and lab.picture.value != before


def test_criteria_offers_only_what_was_scored(scores):
    lab = display.criteria_explorer(scores)
    assert lab.first.reduction.options == ("sum",) and lab.first.calibration.options == ("none",)
    lab.first.criterion.value = "taylor_first"
    assert set(lab.first.reduction.options) == {"sum", "max"}
    assert lab.first.calibration.value == "noise, 4 × 12"


def test_criteria_scores_on_the_fly_once(scores):
    asked = []

    def estimate(criterion, reduction, text):
        asked.append((criterion, reduction, text))
        return ImportanceScores(
            {name: -values for name, values in scores["l2"].scores.items()}, criterion, reduction
        )

    choice = ("mine", "sum", "books")
    lab = display.criteria_explorer({"l2": scores["l2"]}, estimate=estimate, choices=[choice])
    said = []
    lab.text.observe(lambda change: said.append(change["new"]), names="value")
    lab.second.criterion.value = "mine"
    assert "Scoring mine × sum × books" in said[0] and lab.second.value == choice
    assert "Spearman -1.00" in lab.text.value
    lab.ratio.value = 0.5
    assert asked == [choice]


def test_criteria_grades_against_ablation(model, dependencies, batches, scores):
    truth = pl.measure_importance(model, dependencies, batches, NEURONS, progress=False)
    lab = display.criteria_explorer(scores, truth=truth)
    assert lab.family.value == NEURONS, "begins with the family that was ablated"
    found = grade(scores["l2"], truth, ratio=0.25)
    assert f"{found.rank_correlation[NEURONS]:+.2f} {found.overlap[NEURONS]:.0%}" in plain(lab.text.value)
    lab.family.value = "layers.0.mlp_neuron"
    assert "not ablated" in lab.text.value


def test_criteria_with_the_same_notes_go_by_their_names(scores):
    bare = {name: ImportanceScores(values.scores) for name, values in scores.items()}
    assert display.criteria_explorer(bare).first.criterion.options == ("l2", "taylor", "largest")
    with pytest.raises(ValueError, match="no scores given"):
        display.criteria_explorer({})
    with pytest.raises(ValueError, match="no family in common"):
        display.criteria_explorer(
            {"a": ImportanceScores({"x": torch.ones(2)}), "b": ImportanceScores({"y": torch.ones(2)})}
        )


# ---- generation ----------------------------------------------------------------------------------------


def writers():
    return {name: tiny_llama(seed, vocab_size=257) for seed, name in enumerate(("dense", "pruned"))}


def test_bench_streams_side_by_side():
    models, tokenizer = writers(), byte_tokenizer()
    bench = display.generation_bench(models, tokenizer, prompt="ab")
    assert bench.answers == {} and "Press Generate" in bench.text.value
    pictures = []
    bench.picture.observe(lambda change: pictures.append(change["new"]), names="value")
    bench.max_new_tokens.value = 6
    bench.button.click()
    expected = pl.generate(models, tokenizer, "ab", max_new_tokens=6)
    assert bench.answers == {name: expected.text(name, "ab") for name in models}
    assert len(pictures) >= 8, "it grew token by token"
    assert "Done: greedy, at most 6 new tokens" in bench.text.value
    assert not bench.button.disabled and bench.stop.disabled
    bench.prompt.value = "cd"
    assert bench.answers == {
        name: pl.generate(models, tokenizer, "cd", max_new_tokens=6).text(name, "cd") for name in models
    }


def test_bench_stops_after_the_next_token():
    models = writers()
    bench = display.generation_bench(models, byte_tokenizer(), prompt="ab")
    grown = []

    def press(change):
        grown.append(change["new"])
        if len(grown) == 4:
            bench.stop.click()

    bench.picture.observe(press, names="value")
    bench.max_new_tokens.value = 50
    bench.button.click()
    assert "Stopped" in bench.text.value and bench.answers["pruned"] == ""
    assert not bench.button.disabled, "it can be used again"


def test_bench_says_what_is_wrong_with_a_prompt():
    bench = display.generation_bench(writers(), byte_tokenizer(), prompt="x" * 80)
    bench.button.click()
    assert "beyond the model&#x27;s context of 64" in bench.text.value and not bench.button.disabled
    broken = display.generation_bench(
        writers(), byte_tokenizer(), writer=lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    broken.button.click()
    assert "RuntimeError:</b> no memory" in broken.text.value and not broken.button.disabled


# ---- dashboard -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(model, dependencies, scores):
    plan = pl.plan_pruning(dependencies, scores["l2"], ratio=0.5)
    ids = torch.randint(60, (400,), generator=torch.Generator().manual_seed(1))
    models = {"dense": model, "cut": pl.prune(model, plan), "other": tiny_llama(3)}
    return pl.evaluate(models, None, text={"noise": ids, "more noise": ids[:200]}, seq_len=16)


def test_dashboard_shows_the_chosen_numbers(report):
    board = display.evaluation_dashboard(report)
    shown = plain(board.text.value)
    for name in report.models:
        assert f"{report.number(name, 'noise'):,.2f}" in shown
    board.quality.value, board.size.value = "more noise", "macs"
    assert f"{report.number('cut', 'macs') / 1e9:,.2f}" in plain(board.text.value)
    assert "perplexity, more noise" in board.text.value and "multiply-accumulates (G)" in board.text.value
    board.numbers.value = "ratio to the first"
    assert f"{report.ratio('cut', 'macs'):.3f}" in board.text.value and "Ratios to dense" in board.text.value
    before = board.picture.value
    board.models.value = ("cut", "other")
    assert board.shown.models == ("cut", "other") and board.picture.value != before
    assert "Ratios to cut" in board.text.value


def test_dashboard_marks_the_frontier(report):
    board = display.evaluation_dashboard(report)
    rows = re.findall(r"<tr><td[^>]*>(\w+)</td><td[^>]*>([^<]*)</td>", board.text.value)
    assert {name for name, mark in rows if mark} == set(display.results.frontier(report))
    board.models.value = ()
    assert "tick at least one model" in board.text.value and board.picture.value == ""


def test_dashboard_refuses_a_report_without_quality(model):
    with pytest.raises(ValueError, match="no quality to show"):
        display.evaluation_dashboard(pl.evaluate({"dense": model}, None))


# ---- all of them ---------------------------------------------------------------------------------------


def test_every_control_is_labelled_and_shown(model, dependencies, scores, report):
    made = [
        display.group_explorer(dependencies),
        display.plan_explorer(model, dependencies, scores["l2"]),
        display.criteria_explorer(scores),
        display.generation_bench({"dense": model}, byte_tokenizer()),
        display.evaluation_dashboard(report),
        display.recovery_monitor(),
    ]
    for widget in made:
        found = [c for c in controls(widget) if c.layout.display != "none"]
        assert found and all(control.description for control in found), widget
        assert any(name.startswith("pruner-lab-") for name in widget._dom_classes)
