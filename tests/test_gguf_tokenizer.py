"""The tokenizer in a GGUF file gives the tokens of the one it was made from, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_tokenizers import SENTENCES, byte_level, sentence_pieces
from test_gguf import fields, tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pruner_lib.checkpoint import CheckpointError, LlamaCpp, export_gguf
from pruner_lib.checkpoint.gguf_tokenizer import read_vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


def test_the_tokenizer_is_complete(tokenizer: Any, tmp_path: Path) -> None:
    found = fields(export_gguf(tiny(), tokenizer, tmp_path / "model.gguf"))
    vocabulary = tokenizer.get_vocab()
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == 300 and all(tokens[index] == token for token, index in vocabulary.items())
    types = found["tokenizer.ggml.token_type"]
    known = len(vocabulary)
    assert types[:3] == [3, 3, 3] and set(types[3:known]) == {1} and set(types[known:]) == {5}
    assert len(found["tokenizer.ggml.merges"]) == known - 3 - 256
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    assert found["tokenizer.ggml.pre"] == "gpt-2" and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def split_by(pattern: str) -> Any:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


def test_the_splitting_rule_is_recognised_by_what_it_does() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    smollm = byte_level(pre_tokenizers.Sequence([digits, plain]))
    assert read_vocabulary(smollm, 300).pre == "smollm"
    llama3 = split_by(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert read_vocabulary(byte_level(llama3), 300).pre == "llama-bpe"


@pytest.mark.parametrize("prefix", [True, False], ids=["Llama 2", "Gemma"])
def test_sentence_pieces_split_text_alike(prefix: bool, tmp_path: Path) -> None:
    pieces = sentence_pieces(prefix)
    path = export_gguf(tiny(vocab_size=320), pieces, tmp_path / "model.gguf")
    assert fields(path)["tokenizer.ggml.model"] == "llama"
    with LlamaCpp(path) as runner:
        for text in (*SENTENCES, "thecatother", "a"):
            assert runner.tokenize(text) == pieces(text)["input_ids"], text


def test_sentence_pieces_with_a_split_missing_are_refused() -> None:
    with pytest.raises(CheckpointError, match="never joins"):
        read_vocabulary(sentence_pieces(every_split=False), 320)


def test_bos_is_added_where_the_tokenizer_adds_it() -> None:
    adding = byte_level()
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    found = read_vocabulary(adding, 300)
    assert found.add_bos and not found.add_eos


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))),
            "WordLevel",
        ),
        (object, "no `tokenizers` backend"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text as none of"),
    ],
    ids=["kind", "slow", "splitter"],
)
def test_tokenizers_that_cannot_be_written(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        export_gguf(tiny(), make(), tmp_path / "model.gguf")


def test_a_tokenizer_of_another_model(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        export_gguf(tiny(vocab_size=100), tokenizer, tmp_path / "model.gguf")
