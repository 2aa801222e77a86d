"""Runs that are watched, stopped, killed, resumed, and spread over processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from recovery_models import QUICK, counting, same, snapshot, tiny_llama

from pruner_lib.recovery import CheckpointWriteError, Distillation, RecoveryError, RecoverySettings, recover
from pruner_lib.recovery.training import order_of_examples, training_arguments

TESTS = Path(__file__).resolve().parent
RUN = {**QUICK, "max_steps": 9, "dropout": 0.1, "checkpoint_every": 2, "evaluate_every": 3}


def start(code, *arguments, torchrun=0):
    """Another Python with the tests' folder on its path."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def script(folder, body):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(body), encoding="utf-8")
    return path


def run(folder=None, *, resume=False, settings=RUN, model=None, data=None, **changes):
    return recover(
        model or tiny_llama(), None, counting(rows=10) if data is None else data,
        settings=RecoverySettings(**settings), held_out=counting(rows=3, length=9), output_dir=folder,
        resume=resume, progress=False, **changes,
    )  # fmt: skip


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    """With a teacher, dropout, held-out text and a kill that no handler sees, in the middle of a step."""
    code = script(
        tmp_path,
        """
        import os, signal, sys
        import test_recovery_runs as t
        from recovery_models import tiny_llama
        def die(record):
            if record["step"] == 7:
                os.kill(os.getpid(), signal.SIGKILL)
        t.run(sys.argv[1], on_step=die, teacher=tiny_llama(seed=1))
        """,
    )
    killed = start(code, tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]
    seen = []
    resumed = run(
        tmp_path / "run", resume=True, on_step=lambda r: seen.append(r["step"]), teacher=tiny_llama(1)
    )
    whole = run(tmp_path / "other", teacher=tiny_llama(seed=1))
    assert seen == [7, 8, 9]
    assert resumed.history == whole.history
    assert resumed.held_out == whole.held_out
    assert resumed.num_tokens == whole.num_tokens
    assert same(snapshot(resumed.model), snapshot(whole.model))


def test_full_training_resumes_exactly_too(tmp_path):
    settings = {**RUN, "method": "full", "learning_rate": 2e-3, "dropout": 0.0, "schedule": "cosine"}
    stopped = run(tmp_path, settings=settings, on_step=lambda record: record["step"] == 5)
    assert len(stopped.history) == 5
    resumed, whole = (
        run(tmp_path, settings=settings, resume=True),
        run(settings={**settings, "checkpoint_every": 0}),
    )
    assert resumed.losses == whole.losses
    assert same(snapshot(resumed.model), snapshot(whole.model))


def test_checkpoints_hold_no_pickle(tmp_path):
    run(tmp_path, on_step=lambda record: record["step"] == 5)
    (found,) = tmp_path.glob("checkpoint-*")
    assert sorted(path.name for path in found.iterdir()) == [
        "state.json", "state.safetensors", "trainer_state.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {**RUN, "learning_rate": 1e-3}}, r"settings\.learning_rate was 0\.02, is 0\.001"),
        ({"data": counting(rows=11)}, "data differs"),
        ({"model": tiny_llama(seed=5)}, "model differs"),
        ({"teacher": tiny_llama()}, "teacher was None"),
    ],
)
def test_a_resume_folder_of_another_run_is_refused(tmp_path, changes, message):
    run(tmp_path, on_step=lambda record: record["step"] == 3)
    with pytest.raises(RecoveryError, match=f"another run.*{message}"):
        run(tmp_path, resume=True, **changes)
    assert len(list(tmp_path.glob("checkpoint-2/*"))) == 3, "nothing is lost"


def test_resume_without_checkpoint_begins_and_without_folder_is_refused(tmp_path):
    assert len(run(tmp_path / "new", resume=True).history) == 9
    with pytest.raises(RecoveryError, match="resume=True needs output_dir"):
        run(resume=True, settings={**RUN, "checkpoint_every": 0})
    with pytest.raises(RecoveryError, match="checkpoint_every needs output_dir"):
        run()


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, on_step=lambda record: record["step"] == 3)
    weights = tmp_path / "checkpoint-2" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RecoveryError, match=r"checkpoint-2 is damaged.*remove it"):
        run(tmp_path, resume=True)


def test_a_full_disk_at_a_checkpoint_loses_nothing(tmp_path, monkeypatch):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def full(tensors, path, *rest):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointWriteError, match=r"step 4.*No space left.*resume=True") as caught:
        run(tmp_path, settings={**RUN, "method": "full", "learning_rate": 1e-3})
    assert caught.value.step == 4
    assert len(caught.value.result.history) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"], "the older one, no half one"
    monkeypatch.undo()
    settings = {**RUN, "method": "full", "learning_rate": 1e-3}
    resumed = run(tmp_path, settings=settings, resume=True)
    assert same(snapshot(resumed.model), snapshot(run(tmp_path / "b", settings=settings).model))


def test_a_full_disk_at_the_adapter_loses_nothing(tmp_path, monkeypatch):
    from peft import PeftModel

    settings = {**RUN, "checkpoint_every": 0}
    whole = run(tmp_path, settings=settings)

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(CheckpointWriteError, match=r"step 9.*No space left") as caught:
        run(tmp_path, settings=settings)
    assert same(snapshot(caught.value.result.model), snapshot(whole.model))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file(), "the older one is still there"


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    """torchrun with gloo: the same global batches, the same curve, the same weights in both processes."""
    code = script(
        tmp_path,
        """
        import json, os, sys
        import torch
        import test_recovery_runs as t
        from recovery_models import snapshot
        result = t.run(settings={**t.RUN, "checkpoint_every": 0, "dropout": 0.0})
        rank = os.environ["RANK"]
        torch.save(snapshot(result.model), f"{sys.argv[1]}/weights-{rank}")
        with open(f"{sys.argv[1]}/history-{rank}.json", "w") as file:
            json.dump([result.history, result.held_out, result.num_tokens], file)
        torch.distributed.destroy_process_group()
        """,
    )
    done = start(code, tmp_path, torchrun=2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run(settings={**RUN, "checkpoint_every": 0, "dropout": 0.0})
    found = [json.loads((tmp_path / f"history-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    history, held_out, num_tokens = found[0]
    assert [r["loss"] for r in history] == pytest.approx(alone.losses, rel=1e-5)
    assert [value for _, value in held_out] == pytest.approx([value for _, value in alone.held_out], rel=1e-4)
    assert num_tokens == alone.num_tokens
    first, second = (torch.load(tmp_path / f"weights-{rank}") for rank in range(2))
    assert same(first, second)
    for name, value in snapshot(alone.model).items():
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3)


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecoveryError, match="batch_size 4 cannot be dealt out to 3 processes"):
        recover(tiny_llama(), None, counting(), settings=RecoverySettings(**QUICK), progress=False)


@pytest.mark.parametrize("place", ["cpu", "cuda:0", "cuda:1"])
def test_training_stays_on_the_models_device_where_there_are_two_gpus(tmp_path, monkeypatch, place):
    """On a machine that claims to have them: which device the trainer is given, and which GPU is current."""
    from accelerate.state import AcceleratorState

    current = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = training_arguments(RecoverySettings(bf16=False), torch.device(place), 3, str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)  # of the claim nothing may be left
    assert arguments.device == torch.device(place)
    assert arguments.n_gpu == (place != "cpu")
    assert current[-1:] == ([] if place == "cpu" else [torch.device(place)])


def test_the_order_of_examples_is_shuffled_passes():
    order = order_of_examples(5, 13, seed=1)
    assert [sorted(order[i : i + 5]) for i in (0, 5)] == [list(range(5))] * 2
    assert order == order_of_examples(5, 20, seed=1)[:13]
    assert order[:5] != order[5:10]


def test_held_out_perplexity_is_that_of_the_evaluation_stage():
    from pruner_lib.evaluation import perplexity

    model, text = tiny_llama(), counting(rows=3, length=9)
    result = run(settings={**RUN, "checkpoint_every": 0}, model=model)
    assert [step for step, _ in result.held_out] == [0, 3, 6, 9]
    assert result.held_out[0][1] == pytest.approx(float(perplexity(model, None, text, seq_len=9)), rel=1e-5)
    after = float(perplexity(result.model, None, text, seq_len=9))
    assert after == pytest.approx(min(value for _, value in result.held_out), rel=1e-4)
    looked = {r["step"]: r["held_out_perplexity"] for r in result.history if "held_out_perplexity" in r}
    assert looked == dict(result.held_out[1:])


def test_early_stopping_keeps_the_best_state():
    """Counting downwards is unlearnt while counting upwards is learnt."""
    model, other = tiny_llama(), counting(rows=6).flip(1)
    chosen = RecoverySettings(**{**QUICK, "max_steps": 60}, evaluate_every=2, patience=2)
    result = recover(model, None, counting(), settings=chosen, held_out=other, progress=False)
    values = dict(result.held_out)
    assert len(result.history) < 60
    assert result.best_step == min(values, key=values.get)
    assert [step for step, _ in result.held_out][-3:] == [result.best_step + i for i in (0, 2, 4)]
    from pruner_lib.evaluation import perplexity

    assert float(perplexity(result.model, None, other, seq_len=12)) == pytest.approx(
        min(values.values()), rel=1e-4
    )


def test_a_run_that_patience_ended_is_not_trained_further_when_resumed(tmp_path):
    model, other, seen = tiny_llama(), counting(rows=6).flip(1), []
    chosen = RecoverySettings(
        **{**QUICK, "max_steps": 60}, evaluate_every=2, patience=2, checkpoint_every=2, dropout=0.1
    )
    options = {"settings": chosen, "held_out": other, "output_dir": tmp_path, "progress": False}
    ended = recover(model, None, counting(), **options)
    assert len(ended.history) < 60
    resumed = recover(model, None, counting(), **options, resume=True, on_step=seen.append)
    assert seen == []
    assert resumed.history == ended.history
    assert resumed.held_out == ended.held_out
    assert resumed.num_tokens == ended.num_tokens
    assert same(snapshot(resumed.model), snapshot(ended.model))


def test_a_stop_between_two_looks_is_looked_at():
    result = run(settings={**RUN, "checkpoint_every": 0}, on_step=lambda record: record["step"] == 4)
    assert [step for step, _ in result.held_out] == [0, 3, 4]


def test_the_terminal_shows_loss_and_held_out_perplexity(capfd):
    recover(
        tiny_llama(),
        None,
        counting(),
        settings=RecoverySettings(**QUICK, evaluate_every=2),
        held_out=counting(),
    )
    shown = capfd.readouterr().err
    assert "loss=" in shown
    assert "held-out=" in shown


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_memory_and_not_the_result(method):
    model = tiny_llama()
    with_it, without = (
        recover(
            model, None, counting(), progress=False,
            settings=RecoverySettings(**QUICK, method=method, gradient_checkpointing=on),
        )
        for on in (True, False)
    )  # fmt: skip
    assert with_it.losses == pytest.approx(without.losses, rel=1e-5)
    assert not with_it.model.is_activation_checkpointing
    again = with_it.model.generate(counting(1, 4), max_new_tokens=2, do_sample=False)
    assert again.shape == (1, 6)


def test_full_training_changes_only_its_target_and_restores_types():
    model = tiny_llama().bfloat16()
    before = snapshot(model)
    named = RecoverySettings(**{**QUICK, "learning_rate": 1e-2}, method="full", target=("down_proj",))
    result = recover(model, None, counting(), settings=named, progress=False)
    changed = {n for n, value in snapshot(result.model).items() if not torch.equal(value, before[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert same(snapshot(model), before)
    everything = RecoverySettings(**QUICK, method="full", target="all")
    result = recover(model, None, counting(), settings=everything, progress=False)
    assert "model.embed_tokens.weight" in {
        n for n, value in snapshot(result.model).items() if not torch.equal(value, before[n])
    }
    assert result.num_trainable == sum(p.numel() for p in model.parameters())


def test_distillation_is_in_the_identity(tmp_path):
    run(tmp_path, on_step=lambda record: record["step"] == 3)
    other = {**RUN, "distillation": Distillation(temperature=3.0)}
    with pytest.raises(RecoveryError, match=r"settings\.distillation\.temperature was 1\.0, is 3\.0"):
        run(tmp_path, resume=True, settings=other)


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [(1, 4, [1.0]), (3, 100, [0.0, 0.5, 1.0]), (4, 1, [0.0, 1.0, 2 / 3, 1 / 3]), (2, 0, [1.0, 0.5])],
)
def test_a_warm_up_no_shorter_than_the_run_still_reaches_the_peak(steps, warmup, rates):
    chosen = RecoverySettings(**{**QUICK, "max_steps": steps, "warmup_steps": warmup})
    result = recover(tiny_llama(), None, counting(), settings=chosen, progress=False)
    found = [record["learning_rate"] / chosen.learning_rate for record in result.history]
    assert found == pytest.approx(rates)
