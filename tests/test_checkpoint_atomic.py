"""Killed at any step, or stopped by a full disk at any byte: the old or the new checkpoint, whole.

Everything runs in one process of its own that forks a child per attempt. An audit hook, which Python calls
before each operation on the file system, kills the child before its n-th one, for every n.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PREAMBLE = '''
import errno, json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
from pruner_lib.checkpoint import LlamaCpp, export_gguf, load_pruned, save_pruned, saving

place = Path(sys.argv[1])
target = place / "saved"
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             vocab_size=300, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))

def save(number):
    model.lm_head.weight.data.fill_(number)
    save_pruned(model, target, provenance={"number": number})

def found():
    """Number in the checkpoint, the same in weights and record; raises when it is not whole."""
    opened = load_pruned(target)
    numbers = set(opened.lm_head.weight.unique().tolist())
    assert numbers == {json.loads((target / "provenance.json").read_text())["provenance"]["number"]}
    return int(numbers.pop())

def attempt(work):
    """Run in a child; what became of it: 'done', 'killed', or the name of an error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            outcome = "done"
        except BaseException as error:
            outcome = type(error).__name__
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    outcome = os.read(read, 100).decode() if status == 0 else "killed"
    os.close(read)
    return outcome

countdown = [-1]
def hook(event, arguments):
    if countdown[0] < 0 or not event.startswith(("open", "os.", "shutil.", "tempfile.", "ctypes.")):
        return
    countdown[0] -= 1
    if countdown[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)

def save_until(number, step):
    countdown[0] = step
    save(number)
    countdown[0] = -1

outcomes = []
'''

KILLS = (
    PREAMBLE
    + """
saving._exchange = saving._exchange if sys.argv[2] == "one step" else lambda first, second: False
save(0)
countdown[0] = 10**6
save(0)
steps, countdown[0] = 10**6 - countdown[0], -1
# Writing is the same in both ways of replacing; the other one begins with its last operations.
number, outcome = 0, "killed"
for step in range(0 if sys.argv[2] == "one step" else steps - 16, steps + 1):
    outcome = attempt(lambda: save_until(number + 1, step))
    outcomes.append((outcome, found() - number))
    number = found()
for trial in range(int(sys.argv[3])):
    def forever():
        while True:
            for number in (1000, 2000):
                save(number)
    pause = random.Random(trial).uniform(0, 0.25)
    child = os.fork()
    if child == 0:
        forever()
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    outcomes.append(("killed", found()))
save(1)
print(json.dumps([outcomes, number, sorted(path.name for path in place.iterdir())]))
"""
)


def run(code: str, *arguments: str) -> list:
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("exchange", ["one step", "two renames"])
def test_killed_at_every_step_the_old_or_the_new_checkpoint_is_whole(tmp_path: Path, exchange: str) -> None:
    outcomes, last, left = run(KILLS, str(tmp_path), exchange, "5")
    every_step, random = outcomes[:-5], outcomes[-5:]
    assert [outcome for outcome, _ in every_step] == ["killed"] * (len(every_step) - 1) + ["done"]
    counts = Counter(changed for _, changed in every_step)
    assert counts[0] > (30 if exchange == "one step" else 5), "before the swap the old one stays"
    assert counts[1] > 1, "after the swap the new one is there"
    assert set(counts) == {0, 1}
    assert {found for _, found in random} <= {last, 1000, 2000}
    assert left == ["saved"], "half-written folders of killed programs are removed by the next save"


FIRST = (
    PREAMBLE
    + """
import shutil
step, outcome = 0, "killed"
while outcome != "done":
    outcome, step = attempt(lambda: save_until(1, step)), step + 1
    there = target.exists()
    outcomes.append((outcome, found() if there else 0))
    if there:
        shutil.rmtree(target)
save(1)
print(json.dumps([outcomes, sorted(path.name for path in place.iterdir())]))
"""
)


def test_killed_at_every_step_of_the_first_save_there_is_nothing_or_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    outcomes, left = run(FIRST, str(tmp_path))
    assert [outcome for outcome, _ in outcomes] == ["killed"] * (len(outcomes) - 1) + ["done"]
    found = [number for _, number in outcomes]
    assert found == sorted(found) and found.count(0) > 30 and found[-1] == 1
    assert left == ["saved"], "half-written folders of killed programs are removed by the next save"


FULL_DISK = (
    PREAMBLE
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save(0)
for limit in (0, 100, 1500, 20_000, 100_000, 1 << 30):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(1)
    outcomes.append((attempt(limited), found()))
print(json.dumps([outcomes, sorted(path.name for path in place.iterdir())]))
"""
)


def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    outcomes, left = run(FULL_DISK, str(tmp_path))
    *failed, last = outcomes
    assert failed == [["OSError", 0]] * len(failed)
    assert last == ["done", 1]
    assert left == ["saved"]
