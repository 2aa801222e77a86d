"""A tiny model, a byte tokenizer and a cache of a few items, shared by the tests of zero-shot scores."""

import copy

import datasets
import pytest
import torch
from harness_data import ROWS, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.evaluation import ZeroShotOptions
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
