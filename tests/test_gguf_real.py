"""The default model, dense and pruned, says the same in llama.cpp as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pruner_lib.assets import DEFAULT_MODEL, load_text
from pruner_lib.checkpoint import LlamaCpp, export_gguf, measure_gguf
from pruner_lib.checkpoint.record import provenance_of
from pruner_lib.discovery import discover
from pruner_lib.evaluation import perplexity
from pruner_lib.pruning import PruningPlan, prune

pytestmark = pytest.mark.real_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first humans",
    "To make a cup of tea,",
    "2 + 2 =",
    "Ein kurzer Satz: Straße, Überraschung, 漢字",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)
NEW_TOKENS = 6


def removal(kind: str) -> dict[str, list[int]]:
    """A sixteenth of the neurons and a third of the query heads everywhere, or less and less of them."""
    if kind == "uniform":
        neurons = {f"layers.{i}.mlp_neuron": list(range(0, 1536, 16)) for i in range(30)}
        return neurons | {f"layers.{i}.query_head": [0, 3, 6] for i in range(30)}
    heads = {f"layers.{i}.attention_head": [i % 3] for i in range(11, 20, 4)}
    return heads | {f"layers.{i}.mlp_neuron": list(range(8 * i)) for i in range(1, 30)}


@pytest.fixture(scope="module", params=["dense", "uniform", "layers differ"])
def exported(
    request: pytest.FixtureRequest, default_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any, Path]]:
    model, tokenizer = default_model
    if request.param != "dense":
        plan = PruningPlan.from_removal(discover(model), removal(request.param))
        model = prune(model, plan)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(model, tokenizer, path, dtype="f16")
    yield model, tokenizer, path
    path.unlink()


def test_greedy_tokens_agree_on_ten_prompts(exported: tuple[Any, Any, Path]) -> None:
    model, tokenizer, path = exported
    different = {}
    with LlamaCpp(path) as runner:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
            answer = model.generate(torch.tensor([ids]), pad_token_id=0, **options)[0, len(ids) :].tolist()
            found = runner.greedy(ids, NEW_TOKENS)
            if found != answer:
                different[prompt] = (found, answer)
    assert different == {}


def test_perplexity_agrees_within_what_f16_costs(exported: tuple[Any, Any, Path]) -> None:
    model, tokenizer, path = exported
    ids = tokenizer(load_text("wikitext2", "test")[:2000], add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[:64]).reshape(2, 32)
    with LlamaCpp(path) as runner:
        found = runner.perplexity(windows)
    assert found == pytest.approx(float(perplexity(model, None, windows, seq_len=32)), rel=2e-3)


def test_the_tokenizer_in_the_file_splits_text_alike(exported: tuple[Any, Any, Path]) -> None:
    _, tokenizer, path = exported
    with LlamaCpp(path) as runner:
        for prompt in (*PROMPTS, "Year 2024: it's 12345 o'clock.\n\n  We'LL see\t7"):
            assert runner.tokenize(prompt) == tokenizer(prompt)["input_ids"]


def test_eight_bits_cost_little(default_model: Any) -> None:
    model, tokenizer = default_model
    ids = tokenizer(load_text("wikitext2", "test")[:4000], add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[:512]).reshape(8, 64)  # over 64 tokens, chance alone moves it by 2 to 5 %
    (found,) = measure_gguf(model, tokenizer, windows, dtypes=["q8_0"])
    assert found.bytes < 0.28 * sum(4 * parameter.numel() for parameter in model.parameters())
    expected = float(perplexity(model, None, windows, seq_len=64))
    assert found.perplexity == pytest.approx(expected, rel=0.02)


def test_greedy_tokens_of_eight_bits_agree_or_are_nearly_tied(default_model: Any, tmp_path: Path) -> None:
    """Rounding may decide between two tokens of nearly one probability, and between no others."""
    model, tokenizer = default_model
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q8_0")
    behind = {}
    with LlamaCpp(path) as runner:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            found = runner.greedy(ids, NEW_TOKENS)
            with torch.no_grad():
                logits = model(torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            behind[prompt] = logits.max(-1).values - logits[torch.arange(NEW_TOKENS), torch.tensor(found)]
    assert max(float(gap.max()) for gap in behind.values()) < 0.4
    assert sum(int((gap == 0).sum()) for gap in behind.values()) >= 0.9 * NEW_TOKENS * len(PROMPTS)


def test_base_and_licence_of_the_default_model_are_known(default_model: Any) -> None:
    found = provenance_of(default_model[0], None, None, None)
    assert (found["base_model"], found["license"]) == (DEFAULT_MODEL, "Apache-2.0")
