"""Text sources, splits and calibration windows."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from pruner_lib.assets import PAPER_CALIBRATION, AssetError, UnknownAssetError, load_calibration, load_text


class WordTokenizer:
    """One token per word; counts the characters it was given."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.characters = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        self.characters += len(text)
        return {
            "input_ids": [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in text.split()]
        }

    def words(self, ids) -> list[str]:
        names = {number: word for word, number in self.vocabulary.items()}
        return [names[int(number)] for number in ids]


@pytest.fixture
def numbers(tmp_path):
    """A file of the words w0 w1 w2 …; the training split is its first 80 %."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"w{i}" for i in range(20_000)), encoding="utf-8")
    return path


def test_file_is_cut_by_position_into_disjoint_splits_that_join_to_the_whole(numbers):
    parts = [load_text(numbers, split) for split in ("train", "validation", "test")]
    whole = numbers.read_text()
    assert "".join(parts) == whole
    assert [round(len(part) / len(whole), 2) for part in parts] == [0.8, 0.1, 0.1]


@pytest.mark.parametrize(("source", "nearest"), [("book", "books"), ("wikitext", "wikitext2")])
def test_unknown_source_names_the_nearest_and_the_other_ways(source, nearest):
    with pytest.raises(UnknownAssetError, match=f"Did you mean '{nearest}'") as caught:
        load_text(source, "train")
    assert "a path to a text file" in str(caught.value)


def test_unknown_split_says_which_exist(numbers):
    for source in ("wikitext2", numbers):
        with pytest.raises(UnknownAssetError, match="Valid: train, validation, test"):
            load_text(source, "dev")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(AssetError, match="not UTF-8"):
        load_text(path, "train")


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_sets_are_asked_for_by_name_configuration_and_column(monkeypatch):
    asked = []

    def load(path, config, *, split, revision):
        asked.append((path, config, split))
        return {"sentence": ["a b", "c"], "text": ["d", "e"]}

    fake_datasets(monkeypatch, load)
    assert load_text("ptb", "test") == "a b\nc"
    assert load_text("owner/set:small", "train") == "d\ne"
    assert asked == [
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test"),
        ("owner/set", "small", "train"),
    ]


def test_unreachable_hub_set_names_the_sources_that_need_no_hub(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, load)
    with pytest.raises(AssetError, match=r"no route .*wikitext2, books"):
        load_text("ptb", "test")


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AssetError, match=r"pruner-lab\[evaluation\]"):
        load_text("ptb", "test")


def test_windows_are_runs_of_the_text_inside_the_split(numbers):
    tokenizer = WordTokenizer()
    windows = load_calibration(tokenizer, source=numbers, num_samples=20, seq_len=16, seed=3)
    assert windows.shape == (20, 16) and windows.dtype == torch.int64
    for window in windows:
        values = [int(word[1:]) for word in tokenizer.words(window)]
        assert values == list(range(values[0], values[0] + 16))
        assert values[-1] < 0.83 * 20_000
    assert len({int(window[0]) for window in windows}) > 10


def test_same_seed_same_windows_other_seed_others_and_global_state_untouched(numbers):
    tokenizer = WordTokenizer()
    options = {"source": numbers, "num_samples": 5, "seq_len": 16}
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (load_calibration(tokenizer, **options, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_a_seed_draws_the_same_windows_on_every_machine(numbers):
    tokenizer = WordTokenizer()
    windows = load_calibration(tokenizer, source=numbers, num_samples=4, seq_len=4, seed=3)
    assert [tokenizer.words(window)[0] for window in windows] == ["w13541", "w1657", "w3269", "w4255"]


def test_fewer_windows_are_the_first_of_more(numbers):
    tokenizer = WordTokenizer()
    few = load_calibration(tokenizer, source=numbers, num_samples=3, seq_len=8, seed=1)
    many = load_calibration(tokenizer, source=numbers, num_samples=9, seq_len=8, seed=1)
    assert torch.equal(few, many[:3])


def test_only_what_the_windows_need_is_tokenised(numbers):
    tokenizer = WordTokenizer()
    load_calibration(tokenizer, source=numbers, num_samples=2, seq_len=8, seed=0)
    assert tokenizer.characters < 2_000 < len(numbers.read_text())


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_text_says_so(tmp_path, text):
    path = tmp_path / "empty.txt"
    path.write_text(text)
    with pytest.raises(AssetError, match="0 tokens found, 64 needed"):
        load_calibration(WordTokenizer(), source=path)


def test_short_text_says_how_many_tokens_it_has(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one two three four five six seven eight nine ten")
    with pytest.raises(AssetError, match="8 tokens found, 64 needed"):
        load_calibration(WordTokenizer(), source=path)


def test_text_of_just_enough_tokens_gives_its_only_window(tmp_path):
    path = tmp_path / "exact.txt"
    path.write_text("a b c d e f g h" + " " * 4)
    tokenizer = WordTokenizer()
    windows = load_calibration(tokenizer, source=path, num_samples=3, seq_len=7)
    assert [tokenizer.words(window) for window in windows] == [list("abcdefg")] * 3


@pytest.mark.parametrize("option", ["num_samples", "seq_len"])
def test_sizes_below_one_are_refused(option, numbers):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, found 0"):
        load_calibration(WordTokenizer(), source=numbers, **{option: 0})


def test_the_papers_setting_is_ten_windows_of_sixty_four_book_tokens():
    assert dict(PAPER_CALIBRATION) == {"source": "books", "num_samples": 10, "seq_len": 64}
    with pytest.raises(TypeError):
        PAPER_CALIBRATION["num_samples"] = 1


@pytest.mark.real_model
def test_real_sources_have_the_published_sizes_and_wikitext_is_raw(default_model):
    _, tokenizer = default_model
    text = load_text("wikitext2", "test")
    assert text.startswith(" \n = Robert Boulter = \n") and "<unk>" not in text
    assert len(text.split()) == 241_211
    firsts = {}
    for source in ("books", "wikitext2", "c4"):
        batches = load_calibration(tokenizer, **{**PAPER_CALIBRATION, "source": source}, seed=0)
        assert batches.shape == (10, 64)
        firsts[source] = batches[0, :6].tolist()
    assert firsts == {  # the same seed draws the same tokens on every machine
        "books": [288, 1481, 281, 253, 198, 302],
        "wikitext2": [1673, 3717, 3717, 446, 446, 21681],
        "c4": [10244, 30, 657, 417, 99, 9048],
    }
