"""Real processes under torchrun with gloo hold the scores of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from importance_oracle import tiny_gpt2, tiny_llama, tokens_of

from pruner_lib.discovery import discover
from pruner_lib.importance import ImportanceScores, estimate_importance

TESTS = Path(__file__).parent
CASES = {
    "one pass": {"criterion": "taylor_first"},
    "layers": {"criterion": "taylor_first", "micro_batch_size": 1, "accumulate": "layers"},
    "gradients": {"criterion": "taylor_vector", "micro_batch_size": 2, "accumulate": "gradients"},
    "second": {"criterion": "taylor_second"},
    "mixed": {"criterion": "taylor_mixed", "accumulate": "layers"},
    "wanda": {"criterion": "wanda", "micro_batch_size": 1},
    "fluctuation": {"criterion": "fluctuation"},
    "activation": {"criterion": "activation"},
    # Query, key and value apart, which read one input: GPT-2's are fused.
    "wanda, llama": {"criterion": "wanda"},
    "fluctuation, llama": {"criterion": "fluctuation"},
    "activation, llama": {"criterion": "activation"},
    "l1": {"criterion": "l1"},
    "random": {"criterion": "random", "seed": 3},
}


def model_of(case):
    return tiny_llama() if case.endswith("llama") else tiny_gpt2()


WORKER = """
import json, os, sys
import torch
from torch import distributed
from importance_oracle import tiny_gpt2, tokens_of
from pruner_lib.discovery import discover
from pruner_lib.importance import estimate_importance
from test_importance_parallel import CASES, model_of

distributed.init_process_group("gloo")
rank, out = distributed.get_rank(), sys.argv[1]
model = tiny_gpt2()
dependencies = discover(model)
for name, options in CASES.items():  # five sequences: three for one process, two for the other
    chosen = model_of(name)
    scores = estimate_importance(chosen, discover(chosen), tokens_of(5, 7), **options)
    scores.save(f"{out}/{name}.{rank}.json")
try:
    estimate_importance(model, dependencies, tokens_of(1, 7))
except ValueError as error:
    errors = [str(error)]

def spoil(module, args, output):
    return output.masked_fill((args[0] == 7)[..., None], float("nan"))

model.transformer.wte.register_forward_hook(spoil)
tokens = tokens_of(4, 7) % 7
tokens[3, 2] = 7  # read by the second process alone
first = {"criterion": "taylor_first"}
for options in (first, {**first, "accumulate": "layers"}, {"criterion": "wanda"}):
    try:
        estimate_importance(model, dependencies, tokens, **options)
    except (FloatingPointError, RuntimeError) as error:
        errors.append(str(error))
json.dump(errors, open(f"{out}/errors.{rank}.json", "w"))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "worker.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_scores_of_one_process(results, case):
    model = model_of(case)
    alone = estimate_importance(model, discover(model), tokens_of(5, 7), **CASES[case])
    for rank in range(2):
        shared = ImportanceScores.load(results / f"{case}.{rank}.json")
        assert list(shared) == list(alone) and shared.num_samples == alone.num_samples
        for name in alone:
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_what_fails_on_one_rank_fails_on_all(results):
    first, second = (json.loads((results / f"errors.{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 4
    assert first[0] == second[0] == "1 sequences cannot be shared by 2 processes; give more"
    for other, own in zip(first[1:], second[1:], strict=True):
        assert other == "1 of 2 processes failed; the error is in their output"
        assert "calibration sequence 3 is nan" in own and "transformer.wte" in own
