"""Every stage from one configuration file, resumed, refused where it is wrong, on several processes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from recovery_models import tiny_llama
from test_recovery_sources import wide_tokenizer
from torch.distributed import HashStore

from pruner_lib import ImportanceScores, load_pruned, prune, scale_to_loss
from pruner_lib.__main__ import main
from pruner_lib.pipeline import EXAMPLE, PipelineError, read_config, run_pipeline, running
from pruner_lib.pipeline.processes import call
from pruner_lib.recovery import RecoverySettings

CONFIG = """
[model]
name = "{model}"
device = "cpu"

[calibration]
source = "{text}"
num_samples = 4
seq_len = 8

[importance]
criterion = "taylor_first"

[plan]
ratio = 0.25
kinds = ["mlp_neuron"]
layers = "0-1"

[recover]
data = "{text}"
teacher = "dense"
held_out = "{text}:validation"

[recover.settings]
max_steps = 4
batch_size = 4
micro_batch = 2
seq_len = 8
bf16 = false
evaluate_every = 2
checkpoint_every = 2
target = ["down_proj", "up_proj"]

[recover.distillation]
weight = 0.5

[evaluate]
text = ["{text}:test"]
seq_len = 8
cost_at = [1, 8]
"""


@pytest.fixture
def place(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    wide_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text(" ".join(f"word{n % 40}." for n in range(600)))
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(model=tmp_path / "model", text=tmp_path / "words.txt"))
    return tmp_path


def test_one_command_runs_every_stage_and_a_second_one_none(place, capsys):
    assert main([str(place / "run.toml"), "--output", str(place / "out")]) == 0
    first = capsys.readouterr().out
    for stage in ("discover", "score", "plan", "prune", "recover", "evaluate"):
        assert f"{stage}: " in first
    out = place / "out"
    report = (out / "report.md").read_text()
    assert all(name in report for name in ("dense", "pruned", "recovered"))
    rows = {row["model"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
    assert (
        rows["pruned"]["cost"]["params"]
        == rows["recovered"]["cost"]["params"]
        < rows["dense"]["cost"]["params"]
    )
    pruned, recovered = load_pruned(out / "pruned"), load_pruned(out / "recovered")
    assert pruned.model.layers[0].mlp.up_proj.out_features == 18
    changed = {
        name for name, value in recovered.state_dict().items() if not value.equal(pruned.state_dict()[name])
    }
    assert changed and all(name.endswith(("up_proj.weight", "down_proj.weight")) for name in changed)
    (history,) = out.glob("recovery/*/history.jsonl")
    records = [json.loads(line) for line in history.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert main([str(place / "run.toml"), "--output", str(out)]) == 0
    assert capsys.readouterr().out.count("done before") == 6


def test_a_changed_table_runs_its_stage_and_the_later_ones_again(place):
    lines = []
    run_pipeline(read_config(place / "run.toml", output=place / "out"), report=lines.append)
    text = (place / "run.toml").read_text().replace("max_steps = 4", "max_steps = 3")
    (place / "run.toml").write_text(text)
    lines.clear()
    run_pipeline(read_config(place / "run.toml", output=place / "out"), report=lines.append)
    assert ["done before" in line for line in lines] == [True] * 4 + [False] * 2
    lines.clear()
    run_pipeline(read_config(place / "run.toml", output=place / "out"), fresh=True, report=lines.append)
    assert not any("done before" in line for line in lines)


def test_only_the_tables_that_are_there_are_run(place):
    text = (place / "run.toml").read_text()
    (place / "run.toml").write_text(text[: text.index("[recover]")])
    lines = []
    out = run_pipeline(read_config(place / "run.toml", output=place / "out"), report=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["discover", "score", "plan", "prune"]
    assert sorted(path.name for path in out.iterdir()) == [
        "discovery.txt", "plan.json", "pruned", "run.json", "scores.json",
    ]  # fmt: skip


def test_a_loss_that_turns_nan_leaves_a_model_and_a_message(place, capsys):
    text = (
        (place / "run.toml")
        .read_text()
        .replace("[recover.settings]", "[recover.settings]\nlearning_rate = 1e30")
    )
    (place / "run.toml").write_text(text.replace("max_grad_norm = 1.0", ""))
    assert main([str(place / "run.toml"), "--output", str(place / "out")]) == 1
    error = capsys.readouterr().err
    assert "the loss is not finite at step" in error and "interrupted" in error
    assert load_pruned(place / "out" / "interrupted").num_parameters() > 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[plan]", "[plann]", r"unknown table 'plann'.*Did you mean 'plan'"),
        ("ratio = 0.25", "ration = 0.25", r"\[plan\] has an unknown key 'ration'.*'ratio'"),
        ("max_steps = 4", "steps = 4", r"\[recover.settings\] has an unknown key 'steps'"),
        ("batch_size = 4", "batch_size = 3", r"\[recover\] batch_size 3 is not a multiple"),
        ("weight = 0.5", "weight = 2.0", r"\[recover\] weight must be in"),
        ('layers = "0-1"', 'layers = "first"', '"first-last"'),
        ('teacher = "dense"', 'teacher = "other"', 'teacher must be "dense"'),
        (":validation", "", None),
        (":validation", ":train", "is the text that is learnt from; give another split of it"),
        ('teacher = "dense"', 'teacher = "dense"\npaper = "false"', "paper must be true or false"),
        ("bf16 = false", 'bf16 = "false"', "bf16 must be True, False or None"),
        ("max_steps = 4", 'max_steps = 4\nlearning_rate = "1e-4"', r"\[recover\] "),
        ("[recover.settings]", "[recover.self_generated]\n[recover.settings]", None),
        ("weight = 0.5", 'weight = "0.5"', r"\[recover\] "),
        ("[plan]", "[plan", "cannot read"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_runs(place, old, new, message):
    config = place / "run.toml"
    config.write_text(config.read_text().replace(old, new))
    if message is None:  # valid: what is held out is not what is learnt from where no split is said
        read_config(config)
        return
    with pytest.raises(PipelineError, match=message):
        read_config(config)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("importance.scale_to_loss", "ratio = [0.3, 2]", r"outside \(0, 1\]"),
        ("importance.scale_to_loss", 'measure = "kl"', "valid are loss, divergence"),
        ("importance.scale_to_loss", "ridge = 0", "ridge must be above 0"),
        ("importance.scale_to_loss", "growth = 0.5", "growth must be at least 1"),
        ("importance.scale_to_loss", "micro_batch_size = 0", "micro_batch_size must be at least 1"),
        ("importance.scale_to_loss", "compensate = true", "compensate = true: it is how many windows"),
        ("importance.scale_to_loss", 'compensate = "all"', 'compensate = "all": it is how many windows'),
        ("prune.compensate", 'method = "lasso"', "unknown method 'lasso'; valid are ridge, bias"),
        ("prune.compensate", "holdout = 2", "holdout must lie between 0 and 1"),
        ("prune.compensate", "num_samples = 1", "num_samples = 1: it is how many windows"),
    ],
)
def test_wrong_values_of_a_stage_are_refused_before_anything_runs(place, table, line, message):
    (place / "other.toml").write_text(f"[plan]\nratio = 0.5\n[{table}]\n{line}")
    with pytest.raises(PipelineError, match=rf"\[{table}\].*{message}"):
        read_config(place / "other.toml")


def test_tables_that_need_another_are_refused(place):
    for text, message in (
        ("[prune.compensate]\nnum_samples = 8", r"\[prune\] needs a \[plan\]"),
        ("[plan]\nratio = 0.5\n[prune]\ncompensate = true", r"must be a table, \[prune\.compensate\]"),
        ("[plan]\nratio = 0.5\n[prune.compensate]\nridge = 1", "unknown key 'ridge'.*ridges"),
        ("[plan]\nratio = 0.5\n[importance]\nscale_to_loss = 3", "must be true, false or a table.*ridge"),
        ("[plan]\nratio = 0.5\n[importance.scale_to_loss]\nwindows = 8", "unknown key 'windows'.*measure"),
        ('[importance]\ncriterion = "l2"', r"\[importance\] needs a \[plan\]"),
        ("[recover]\n", r"\[recover\] needs data"),
        ("plan = 3", "plan must be a table"),
    ):
        (place / "other.toml").write_text(text)
        with pytest.raises(PipelineError, match=message):
            read_config(place / "other.toml")


def test_the_example_is_a_valid_configuration_and_prints(tmp_path, capsys):
    assert main(["--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE
    (tmp_path / "example.toml").write_text(EXAMPLE)
    config = read_config(tmp_path / "example.toml")
    assert config.recovery_settings().template == "chat"
    assert config.output == Path("runs/example")


def test_json_and_the_papers_settings(tmp_path):
    content = {"recover": {"data": "alpaca", "paper": True, "settings": {"micro_batch": 8}}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    config = read_config(tmp_path / "c.json")
    assert config.recovery_settings() == RecoverySettings.paper(micro_batch=8)
    assert config.output == Path("runs/c")


def test_the_command_needs_a_file_and_names_a_missing_one(tmp_path, capsys):
    assert main([str(tmp_path / "none.toml")]) == 1
    assert "--example" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize("recover", [True, False])
def test_a_further_process_waits_for_the_first_ones_word_whatever_lies_in_the_folder(
    place, monkeypatch, recover
):
    """With the files of a finished run in place, as ``--fresh`` finds them."""
    config = read_config(place / "run.toml", output=place / "out")
    run_pipeline(config, report=lambda line: None)
    store, joined = HashStore(), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(running, "open_store", lambda: store)
    monkeypatch.setattr(running._Run, "recover", lambda run: joined.append(run))
    with ThreadPoolExecutor(1) as pool:
        further = pool.submit(run_pipeline, config, fresh=True)
        with pytest.raises(TimeoutError):
            further.result(timeout=1.5)
        assert not joined
        call(store, 1, recover=recover)
        assert further.result(timeout=30) == config.output
    assert len(joined) == recover


@pytest.mark.slow
def test_torchrun_recovers_on_two_processes_with_the_same_result(place):
    """The first process runs every stage, the second joins it in the recovery; again with ``--fresh``."""
    root = Path(__file__).resolve().parents[1]
    for again in ([], [], ["--fresh"]):
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "-m", "pruner_lib", str(place / "run.toml"), "--output", str(place / "two"), *again,
            ],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    run_pipeline(read_config(place / "run.toml", output=place / "one"), report=lambda line: None)
    losses = []
    for name in ("one", "two"):
        (history,) = (place / name).glob("recovery/*/history.jsonl")
        losses.append([json.loads(line)["loss"] for line in history.read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_best_recipe_by_one_file(place):
    """Scores in nats, one ranking, and the readers fitted again."""
    text = CONFIG.format(model=place / "model", text=place / "words.txt")
    text = text[: text.index("[recover]")].replace('ratio = 0.25\nkinds = ["mlp_neuron"]\nlayers = "0-1"', "")
    text = text.replace("[plan]", '[plan]\ntarget_params = 0.9\npreset = "best"')
    measured = 'scale_to_loss = {measure = "divergence", ratio = [0.3, 0.6], compensate = 10}'
    text = text.replace('criterion = "taylor_first"', f'criterion = "wanda"\n{measured}')
    config = place / "best.toml"
    config.write_text(text + "[prune.compensate]\nnum_samples = 12\nridges = [0.1, 1.0]\n")
    scaled = patch.object(running, "scale_to_loss", wraps=scale_to_loss)
    with patch.object(running, "prune", wraps=prune) as cut, scaled as scale:
        run_pipeline(read_config(config, output=place / "best"))
    (call,) = scale.call_args_list
    assert call.kwargs["ratio"] == (0.3, 0.6) and call.kwargs["compensate"].shape == (10, 8)
    scores = ImportanceScores.load(place / "best" / "scores.json")
    assert "scaled to the divergence" in scores.criterion
    plan = json.loads((place / "best" / "plan.json").read_text())
    dense, pruned = tiny_llama(), load_pruned(place / "best" / "pruned")
    assert plan["removal"] and sum(p.numel() for p in pruned.parameters()) <= 0.9 * sum(
        p.numel() for p in dense.parameters()
    )
    (call,) = cut.call_args_list
    settings = call.kwargs["compensate"]
    assert settings.batches.shape == (12, 8) and settings.ridges == (0.1, 1.0)
