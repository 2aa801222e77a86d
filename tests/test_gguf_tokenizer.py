"""The tokenizer in a GGUF file gives the tokens of the one it was made from, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_tokenizers import SENTENCES, byte_level, sentence_pieces
from test_gguf import fields, tiny
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pruner_lib.checkpoint import CheckpointError, LlamaCpp, export_gguf
from pruner_lib.checkpoint.gguf_tokenizer import merge_scores, read_vocabulary


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
    assert read_vocabulary(rebuilt(byte_level(split_by(LLAMA3)), ignore_merges=True), 300).pre == "llama-bpe"


def rebuilt(tokenizer: Any, post: Any = None, **model: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with other entries in its model's description."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"] |= model
    backend = Tokenizer.from_str(json.dumps(document))
    if post is not None:
        backend.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )  # fmt: skip


def around(text: str) -> Any:
    return processors.TemplateProcessing(single=text, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 0)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = LLAMA3.replace(r"?\p{L}+|\p{N}{1,3}", r"?[\p{L}\p{M}]+|\p{N}")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rebuilt(byte_level(), ignore_merges=True), "splits text as none of"),
        (lambda: byte_level(split_by(LLAMA3)), "splits text as none of"),
        (lambda: byte_level(split_by(MARKS)), "splits text as none of"),
        (
            lambda: rebuilt(byte_level(), around("<s> <unk> $A </s>")),
            r"puts the tokens \[1, 0\] before and \[2\]",
        ),
        (lambda: rebuilt(byte_level(), around("<unk> $A")), r"\[0\] before and \[\] after"),
        (lambda: without_a_byte(sentence_pieces()), r"no token <0x41> \(1 of the 256 bytes"),
    ],
    ids=["whole words", "no whole words", "marks", "two before", "another before", "bytes"],
)
def test_what_would_give_other_tokens_is_refused(make: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_vocabulary(make(), 320)


def without_a_byte(pieces: Any) -> PreTrainedTokenizerFast:
    vocabulary = json.loads(pieces.backend_tokenizer.to_str())["model"]["vocab"]
    return rebuilt(pieces, vocab={name: i for name, i in vocabulary.items() if name != "<0x41>"})


def test_the_end_of_a_text_is_the_model_s_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    """llama.cpp would stop at token 11 of a file that names none."""
    endless = byte_level()
    endless.eos_token = None
    assert fields(export_gguf(tiny(), endless, tmp_path / "a.gguf"))["tokenizer.ggml.eos_token_id"] == 2
    model = tiny(eos_token_id=None)
    with pytest.raises(CheckpointError, match="which token ends a text"):
        export_gguf(model, endless, tmp_path / "b.gguf")


def test_templates_by_name_and_names_of_unused_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ a }}", "tool": "{{ b }}"}
    tokenizer.add_tokens(["[UNUSED299]"])
    found = fields(export_gguf(tiny(), tokenizer, tmp_path / "model.gguf"))
    assert (
        found["tokenizer.chat_template"] == "{{ a }}" and found["tokenizer.chat_template.tool"] == "{{ b }}"
    )
    assert len(set(found["tokenizer.ggml.tokens"])) == 300


def test_differences_that_one_can_live_with_are_told() -> None:
    pieces = sentence_pieces()
    document = json.loads(pieces.backend_tokenizer.to_str())
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    of_today = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)), bos_token="<s>", eos_token="</s>"
    )
    with pytest.warns(UserWarning, match="begins with a space, or follows a special token"):
        assert read_vocabulary(of_today, 320).space_prefix
    composing = byte_level()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    composing.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.warns(UserWarning, match=r"not composed first \(NFC\); <mask> does not look"):
        read_vocabulary(composing, 320)


def test_scores_need_the_splits_of_a_token_together_and_complete() -> None:
    letters = ["a", "b", "c", "d"]
    pairs = [("a", "b"), ("a", "bc"), ("c", "d"), ("ab", "c"), ("b", "c")]
    with pytest.raises(CheckpointError, match="between two ways to join its token 'abc' it joins 'cd'"):
        merge_scores([*letters, "ab", "bc", "cd", "abc"], pairs)
    with pytest.raises(CheckpointError, match="never joins 'ab' and 'ab' to its token 'abab'"):
        merge_scores([*letters, "ab", "abab"], [("a", "b")])
    assert merge_scores(["a", "b", "ab"], [("a", "b")])[2] == 0


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
