"""Which layers can go: the scan against cutting, the proposal by hand, files and figures."""

import json
import math

import pytest
import torch
from test_surgery import tiny

from pruner_lib import display
from pruner_lib.discovery import discover
from pruner_lib.importance import ImportanceScores
from pruner_lib.importance.calibration import mean_loss
from pruner_lib.pruning import PruningPlan, Sensitivity, plan_pruning, prune, scan_sensitivity

BATCHES = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(3))


def random_scores(dependencies):
    generator = torch.Generator().manual_seed(4)
    return ImportanceScores.from_dict(
        {f.name: torch.rand(f.size, generator=generator) for f in dependencies.families}
    )


def perplexity_of(model):
    return math.exp(mean_loss(model, [BATCHES]))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_scan_measures_what_cutting_would_give(name):
    model = tiny(name)
    dependencies = discover(model)
    scores = random_scores(dependencies)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scan = scan_sensitivity(model, dependencies, scores, BATCHES, micro_batch_size=3, separate=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert scan.dense == pytest.approx(perplexity_of(model), rel=1e-9)
    for curve, kinds in (("all kinds", ("attention_head", "mlp_neuron")), ("mlp_neuron", "mlp_neuron")):
        plan = plan_pruning(dependencies, scores, ratio=0.5, layers=[1], kinds=kinds)
        assert scan.perplexity[curve][1] == pytest.approx(perplexity_of(prune(model, plan)), rel=1e-9)
    assert len(set(scan.perplexity["all kinds"])) == 3


def test_weights_come_back_after_an_exception(monkeypatch):
    model = tiny()
    dependencies = discover(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with pytest.raises(FloatingPointError):
        scan_sensitivity(model, dependencies, random_scores(dependencies), torch.full((1, 4), 5))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "embed" not in k)


def test_about_2048_tokens_run_at_once():
    model, seen = tiny(), []
    dependencies = discover(model)

    def watch(module, args, given):
        seen.append(given["input_ids"].shape[0])

    model.register_forward_pre_hook(watch, with_kwargs=True)
    long = torch.randint(3, 64, (40, 64), generator=torch.Generator().manual_seed(3))
    by_default = scan_sensitivity(model, dependencies, random_scores(dependencies), long)
    assert seen == [32, 8] * 4
    seen.clear()
    by_hand = scan_sensitivity(model, dependencies, random_scores(dependencies), long, micro_batch_size=40)
    assert seen == [40] * 4
    assert by_default.perplexity["all kinds"] == pytest.approx(by_hand.perplexity["all kinds"], rel=1e-9)


def test_running_out_of_memory_is_answered_with_advice(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    model = tiny()
    dependencies = discover(model)
    monkeypatch.setattr("pruner_lib.pruning.sensitivity.mean_loss", full)
    with pytest.raises(MemoryError, match="lower micro_batch_size"):
        scan_sensitivity(model, dependencies, random_scores(dependencies), BATCHES)


def scan_of(*rises):
    return Sensitivity(dense=20.0, perplexity={"all kinds": tuple(20 * rise for rise in rises)}, ratio=0.5)


@pytest.mark.parametrize(
    ("rises", "proposed"),
    [
        ((3.0, 1.5, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 2.0), range(2, 8)),  # sensitive ends
        ((1.1,) * 9, range(9)),  # none stands out
        ((1.1, 3.0, 1.1, 1.1, 9.0, 1.1, 1.1, 1.1, 1.1), range(2, 9)),  # the middle one is left in
        ((1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 3.0, 1.1, 1.1), range(6)),  # and what lies outside an end goes too
        ((0.9, 0.95, 1.2), range(2)),  # two layers are better off pruned, the third is not
    ],
)
def test_the_proposal_by_hand(rises, proposed):
    assert scan_of(*rises).propose() == proposed


def test_a_limit_decides_what_is_sensitive():
    scan = scan_of(1.3, 1.1, 1.1, 1.1, 1.2, 1.1)
    assert scan.sensitive() == () and scan.propose() == range(6)
    assert scan.sensitive(0.15) == (0, 4) and scan.propose(0.15) == range(1, 4)
    assert scan.rises() == pytest.approx((1.3, 1.1, 1.1, 1.1, 1.2, 1.1))
    assert scan.propose(-1.0) == range(2, 4), "when all are sensitive, the middle third is left"


def test_saved_and_loaded(tmp_path):
    scan = Sensitivity(12.5, {"all kinds": (13.0, None, 14.5)}, ratio=0.25, source="wikitext2 valid")
    again = Sensitivity.load(scan.save(tmp_path / "scan.json"))
    assert (again.dense, dict(again.perplexity), again.ratio, again.source) == (
        scan.dense, dict(scan.perplexity), scan.ratio, scan.source
    )  # fmt: skip
    assert "proposed layers: 0 to 1" in repr(again) and "–" in repr(again)
    for text in (
        "{",
        "[]",
        json.dumps({"format": "other", "version": 1}),
        json.dumps({"format": "pruner_lib.sensitivity"}),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no sensitivity scan"):
            Sensitivity.load(tmp_path / "bad.json")


def test_figures_say_what_they_show():
    scan = scan_of(3.0, 1.5, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 2.0)
    axes = scan.plot().axes[0]
    drawn = next(line for line in axes.lines if line.get_label() == "all kinds")
    assert drawn.get_ydata() == pytest.approx(scan.rises())
    assert display.describe_sensitivity(scan) == (
        "Layer 0 is the most sensitive (3.0 times the dense perplexity); sensitive layers: 0, 1, 8; "
        "layers to prune: 2 to 7."
    )


def test_plans_of_every_sort_are_drawn():
    dependencies = discover(tiny("llama"))
    removal = {"hidden_channel": [0, 1, 2, 3], "layers.0.mlp_neuron": [0, 1]}
    plan = PruningPlan.from_removal(dependencies, removal, dropped=["layers.1"])
    bars, lines = plan.plot().axes
    kept = [bar.get_height() for bar in bars.patches[:3]]
    assert kept[1] == 0 and kept[0] < kept[2]
    shares = {line.get_label(): list(line.get_ydata()) for line in lines.lines}
    assert shares["hidden_channel"] == [87.5] * 3
    assert math.isnan(shares["mlp_neuron"][1]) and not math.isnan(shares["mlp_neuron"][2])
    crosses = next(line for line in lines.lines if line.get_label() == "dropped whole")
    assert list(crosses.get_xdata()) == [1]
    assert "layer 1 dropped whole" in display.describe_plan(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, r"outside \(0, 1\)"),
        ({"ratio": 1.0}, r"outside \(0, 1\)"),
        ({"kinds": "hidden_channel"}, "hidden_channel spans all layers"),
        ({"kinds": "expert"}, "this model has none"),
        ({"kinds": ("mlp_neuron", "block")}, "layers dropped whole have no share of groups; score_layers"),
    ],
)
def test_refusals(options, message):
    dependencies = discover(tiny())
    with pytest.raises(ValueError, match=message):
        scan_sensitivity(tiny(), dependencies, random_scores(dependencies), BATCHES, **options)
