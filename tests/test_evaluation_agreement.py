"""Our numbers against tools that know nothing of this library: the harness and llama.cpp."""

import copy
import math

import pytest
import torch
from harness_data import byte_tokenizer
from test_evaluation_zero_shot import QUIET, tiny_llama

from pruner_lib.assets import fetch, load_text
from pruner_lib.evaluation import PAPER_TASKS, perplexity, write_task_files, zero_shot


def by_rolling_windows(model, tokenizer, texts, length):
    """exp(−Σ log p / tokens) by the harness, each text in one window behind a BOS token."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, max_length=length,
        softmax_dtype="float64",
    )  # fmt: skip
    asked = [Instance("loglikelihood_rolling", {}, (text,), i, ("t", i, 1)) for i, text in enumerate(texts)]
    return math.exp(-sum(runner.loglikelihood_rolling(asked, disable_tqdm=True)) / (len(texts) * length))


def test_perplexity_is_the_harness_s_rolling_one():
    """With a BOS before each window; what the harness prints divides by words instead of tokens."""
    model, tokenizer = tiny_llama().double(), byte_tokenizer()
    tokenizer.bos_token = "</s>"
    texts = [
        f"{n} boats left the {place} at dawn."[:24]
        for n, place in enumerate(["harbour", "long quay", "old pier"])
    ]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    found = perplexity(model, tokenizer, ids, seq_len=25, bos=True)
    assert found.num_tokens == 3 * 24
    assert float(found) == pytest.approx(by_rolling_windows(model, tokenizer, texts, 24), rel=1e-10)


@pytest.mark.real_model
def test_smollm2_s_perplexity_is_the_harness_s(default_model):
    model, tokenizer = default_model
    ids = tokenizer(load_text("wikitext2", "test")[:6000], add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + 127] for start in range(0, 4 * 127, 127)]
    texts = [tokenizer.decode(row) for row in rows]
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == rows
    found = perplexity(model, tokenizer, torch.tensor(rows), seq_len=128, bos=True)
    assert float(found) == pytest.approx(by_rolling_windows(model, tokenizer, texts, 127), rel=1e-4)


@pytest.mark.real_model
def test_smollm2_s_accuracies_are_the_harness_s(default_model):
    """The seven tasks on the real package files, item by item."""
    from test_evaluation_zero_shot import by_the_harness

    model, tokenizer = default_model
    found = zero_shot(model, tokenizer, limit=3, data="package", options=QUIET)
    expected = by_the_harness(model, tokenizer, write_task_files(), limit=3)
    assert found.tasks == PAPER_TASKS
    totals = {score.task: score.num_items_total for score in found.scores}
    assert totals == {
        "boolq": 3270, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 570,
        "arc_challenge": 299, "openbookqa": 500,
    }  # fmt: skip
    for score in found.scores:
        for name, estimate in score.metrics.items():
            assert estimate.value == expected["results"][score.task][f"{name},none"], (score.task, name)


@pytest.mark.real_model
def test_smollm2_s_perplexity_is_llama_cpp_s(default_model):
    """The GGUF file that the model was converted from; llama.cpp rounds activations to 8 bits."""
    from pruner_lib.checkpoint.llama_cpp import LlamaCpp

    model, tokenizer = default_model
    ids = tokenizer(load_text("wikitext2", "test")[:2000], add_special_tokens=False)["input_ids"][:192]
    windows = torch.tensor(ids).view(3, 64)
    with LlamaCpp(fetch("SmolLM2-135M-Instruct")) as engine:
        theirs = engine.perplexity(windows)
    assert float(perplexity(model, None, windows, seq_len=64)) == pytest.approx(theirs, rel=0.01)
