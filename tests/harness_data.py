"""A few items of each of the paper's tasks, in the package's form, and a byte tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LETTERS = ["A", "B", "C", "D"]


def _question(number: int, stem: str) -> dict:
    texts = [f"{word} {number}" for word in ("a stone", "the rain", "one lamp", "green ink")]
    return {
        "id": str(number),
        stem: f"What lies on table {number}?",
        "choices": {"text": texts, "label": _LETTERS},
        "answerKey": _LETTERS[number % 4],
    }


ROWS: dict[str, list[dict]] = {
    "boolq": [
        {"question": f"is {n} even", "answer": n % 2 == 0, "passage": "Numbers go on. " * (1 + n % 3)}
        for n in range(6)
    ],
    "piqa": [
        {"goal": f"Open {n}", "sol1": "turn the lid", "sol2": "sit" + " again" * (n % 3), "label": n % 2}
        for n in range(1, 7)
    ],
    "hellaswag": [
        {
            "ind": n, "activity_label": "Rowing", "ctx_a": f"Boat {n} leaves.", "ctx_b": "then", "ctx": "",
            "endings": [f"it {verb} {n} times." for verb in ("turns", "sinks [title]", "sings", "flies")],
            "source_id": "", "split": "val", "split_type": "indomain", "label": str(n % 4),
        }
        for n in range(6)
    ],
    "winogrande": [
        {
            "sentence": f"Ann gave Eve {n} plums because _ was hungry.", "option1": "Ann", "option2": "Eve",
            "answer": str(1 + n % 2),
        }
        for n in range(6)
    ],
    "arc_easy": [_question(n, "question") for n in range(6)],
    "arc_challenge": [_question(n, "question") for n in range(2, 8)],
    "openbookqa": [_question(n, "question_stem") for n in range(3, 9)],
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end token: 257 in all; every text has an encoding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)} | {"</s>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
