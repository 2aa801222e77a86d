"""The report with everything in it, its figures, and the command that makes it from folders."""

import json

import pytest
import torch
from harness_data import byte_tokenizer
from test_evaluation_zero_shot import QUIET, package, tiny_llama  # noqa: F401  (a fixture)

from pruner_lib.checkpoint import save_pruned
from pruner_lib.discovery import discover
from pruner_lib.display import describe_latency, describe_tradeoff, plot_latency, plot_tradeoff
from pruner_lib.evaluation import EvaluationError, EvaluationReport, evaluate, perplexity, zero_shot
from pruner_lib.evaluation.__main__ import main
from pruner_lib.pruning import PruningPlan, prune

TEXT = "The sea was calm and the boats went out before dawn. " * 40
SETTINGS = {
    "text": {"sea": TEXT}, "seq_len": (16, 64), "max_tokens": 512,
    "zero_shot": {"tasks": ("piqa", "arc_easy"), "data": "package", "options": QUIET},
    "memory": {"prompt_len": 8},
    "latency": {"prompt_lengths": (8,), "new_tokens": 2, "repeats": 2},
    "generation": {"prompts": ["The sea"], "max_new_tokens": 3},
}  # fmt: skip


def pruned(model):
    dependencies = discover(model)
    removal = {family.name: list(range(8)) for family in dependencies.select(kind="mlp_neuron")}
    return prune(model, PruningPlan.from_removal(dependencies, removal))


@pytest.fixture(scope="module")
def models():
    model = tiny_llama()
    return {"dense": model, "pruned": pruned(model)}


@pytest.fixture
def report(models, package):  # noqa: F811
    return evaluate(models, byte_tokenizer(), **SETTINGS)


@pytest.mark.filterwarnings("ignore:times vary")
def test_takes_everything_and_saves_everything(models, report, tmp_path):
    assert report.sources == ("sea, 16", "sea, 64")
    assert report.tasks == ("piqa", "arc_easy")
    tokenizer = byte_tokenizer()
    for name, model in models.items():
        expected = perplexity(model, tokenizer, TEXT, seq_len=64, max_tokens=512, source="sea")
        assert report[name].perplexities["sea, 64"] == expected
        scores = zero_shot(model, tokenizer, **SETTINGS["zero_shot"])
        assert report[name].zero_shot == scores
    assert report.ratio("pruned", "average") == pytest.approx(
        report["pruned"].zero_shot.average / report["dense"].zero_shot.average
    )
    assert report.ratio("pruned", "peak_bytes") < 1
    assert report.difference("dense").value == 0.0
    assert EvaluationReport.load(report.save(tmp_path / "r.json")) == report
    text = report.save(tmp_path / "r.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Size and perplexity", "## Zero-shot accuracy", "## Latency", "## Generations",
    ]  # fmt: skip
    assert report._repr_html_().count("<table>") == 4


@pytest.mark.filterwarnings("ignore:times vary")
def test_prints_as_the_paper_does(report):
    size, accuracy, latency, generations = str(report).split("\n\n")
    assert size.splitlines()[0].split()[:2] == ["model", "parameters"]
    assert "peak memory" in size
    assert "perplexity, sea, 16" in size
    assert accuracy.splitlines()[0].split() == [
        "model",
        "PIQA",
        "ARC-e",
        "average",
        "±",
        "s.e.",
        "change",
        "±",
        "s.e.",
    ]
    change = report["pruned"].zero_shot.average - report["dense"].zero_shot.average
    assert f"{100 * change:+.2f}" in accuracy.splitlines()[2]
    assert "PIQA acc validation 6/6" in accuracy
    assert "MACs say" in latency
    assert "> The sea" in generations


@pytest.mark.filterwarnings("ignore:times vary")
def test_joins_and_adds(models, report):
    tokenizer = byte_tokenizer()
    parts = [
        evaluate({name: model}, tokenizer, **{k: v for k, v in SETTINGS.items() if k != "latency"})
        for name, model in models.items()
    ]
    joined = EvaluationReport.join(parts)
    assert joined.add(latency=report.latency) == report
    with pytest.raises(EvaluationError, match="different models; found dense, dense"):
        EvaluationReport.join([parts[0], parts[0]])
    with pytest.raises(EvaluationError, match="no model 'x'"):
        joined.add(memory={"x": report["dense"].memory})


@pytest.mark.filterwarnings("ignore:times vary")
def test_figures_draw_the_numbers(report):
    figure = plot_tradeoff(report, quality="average")
    (axes,) = figure.axes
    sizes = {round(row.cost.params / 1e6, 6) for row in report.rows}
    drawn = {round(float(x), 6) for line in axes.lines for x in line.get_xdata()}
    assert drawn == sizes
    assert "on the frontier: pruned" in describe_tradeoff(report)
    assert report.plot().axes[0].get_yscale() == "log"
    assert plot_latency(report.latency).axes[0].get_legend() is not None
    assert describe_latency(report.latency).startswith("Against dense: pruned at 1 × 8:")


def test_the_frontier_leaves_out_what_is_beaten():
    points = {"big": (100, 10.0), "small": (50, 20.0), "bad": (60, 30.0), "same": (100, 11.0)}
    assert describe_tradeoff(points).endswith("on the frontier: small, big.")
    assert "from low to high perplexity: big, same, small, bad" in describe_tradeoff(points)


def test_a_window_beyond_the_context_is_left_out_of_several():
    model = tiny_llama(context=64)
    found = evaluate({"m": model}, byte_tokenizer(), text={"sea": TEXT}, seq_len=(32, 128))
    assert found.sources == ("sea, 32",)
    with pytest.raises(EvaluationError, match="context of 64"):
        evaluate({"m": model}, byte_tokenizer(), text={"sea": TEXT}, seq_len=128)


def test_a_model_elsewhere_is_named(models):
    with pytest.raises(EvaluationError, match="model 'dense': cuda was asked for, but the model is on cpu"):
        evaluate(models, None, device="cuda")
    with pytest.raises(EvaluationError, match="model 'dense': zero-shot tasks and generation need"):
        evaluate(models, None, zero_shot={})


@pytest.fixture
def folders(models, tmp_path):
    models["dense"].save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    save_pruned(models["pruned"], tmp_path / "small", tokenizer=byte_tokenizer())
    (tmp_path / "sea.txt").write_text(TEXT * 10)
    return tmp_path


def command(folders, *places, extra=()):
    return main(
        [
            *(str(folders / place) for place in places), "--output", str(folders / "out"), "--device", "cpu",
            "--text", str(folders / "sea.txt"), "--seq-len", "16", "--data", "package", *extra,
        ]
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:times vary")
def test_command_makes_the_report_from_folders(folders, models, package, capsys):  # noqa: F811
    extra = ["--tasks", "piqa", "--limit", "4", "--prompts", "The sea", "--latency", "--prompt-lengths", "8"]
    assert command(folders, "dense", "small", extra=extra) == 0
    report = EvaluationReport.load(folders / "out" / "report.json")
    assert report.models == ("dense", "small")
    assert report["small"].cost.params == sum(p.numel() for p in models["pruned"].parameters())
    assert report["small"].zero_shot["piqa"].num_items == 4
    assert report.generations.models == tuple(row.model for row in report.latency.rows) == report.models
    assert report.sources == ("sea test",)
    assert (folders / "out" / "frontier.png").stat().st_size > 5000
    assert "## Latency" in (folders / "out" / "report.md").read_text()
    assert "on the frontier" in capsys.readouterr().out


def test_command_keeps_what_it_has_when_a_folder_is_broken(folders, capsys):
    (folders / "small" / "model.safetensors").write_bytes(b"cut")
    assert command(folders, "dense", "small", "nowhere", extra=["--tasks"]) == 1
    report = EvaluationReport.load(folders / "out" / "report.json")
    assert report.models == ("dense",)
    errors = capsys.readouterr().err
    assert "error: small:" in errors
    assert "truncated" in errors
    assert "error: nowhere:" in errors


def test_command_refuses_a_text_it_does_not_know(folders, capsys):
    assert main([str(folders / "dense"), "--text", "wikitext9", "--output", str(folders / "out")]) == 1
    assert "error: no text is called 'wikitext9'" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_command_warns_of_another_tokenizer(folders, models):
    other = byte_tokenizer()
    other.add_tokens(["zzz"])
    torch.manual_seed(0)
    models["dense"].save_pretrained(folders / "other")
    other.save_pretrained(folders / "other")
    with pytest.warns(UserWarning, match="other and dense have different tokenizers"):
        assert command(folders, "dense", "other", extra=["--tasks"]) == 0


def test_command_says_that_a_tokenizer_is_missing(folders, models, capsys):
    save_pruned(models["pruned"], folders / "bare")
    assert command(folders, "bare", extra=["--tasks"]) == 1
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (folders / "out").exists()
    assert json.loads((folders / "bare" / "config.json").read_text())
