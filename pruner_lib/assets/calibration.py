"""Calibration batches: windows of text as token ids, the same for the same seed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.texts import load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# LLM-Pruner's setting, with the public-domain novels in the place of BookCorpus.
PAPER_CALIBRATION: Mapping[str, Any] = MappingProxyType({"source": "books", "num_samples": 10, "seq_len": 64})

_CHARACTERS_PER_TOKEN = 8  # generous, so that one tokenizer call is nearly always enough
_ATTEMPTS = 32


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | os.PathLike[str] = "wikitext2",
    num_samples: int = 10,
    seq_len: int = 64,
    seed: int = 0,
    split: str = "train",
) -> torch.Tensor:
    """Draw windows of ``seq_len`` tokens from a text.

    Each window starts at a random character, moved on to the next start of a word, and only the characters
    it needs are tokenised. No BOS or other special token is added. A text with too few tokens after
    the drawn places is tokenised as a whole and windows are drawn from its tokens; they may overlap.

    >>> load_calibration(tokenizer, **PAPER_CALIBRATION, seed=0).shape
    torch.Size([10, 64])

    Args:
        tokenizer: the model's own.
        source: as for :func:`load_text`.
        num_samples: number of windows.
        seq_len: tokens in each.
        seed: of the drawing (NumPy's PCG64); no other random state is read or changed.
        split: as for :func:`load_text`.

    Returns:
        Token ids, int64 ``[num_samples, seq_len]``.

    Raises:
        ValueError: num_samples or seq_len is below 1.
        AssetError: the text is empty or has fewer than seq_len tokens.
    """
    for label, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{label} must be at least 1, found {value}")
    text = load_text(source, split)
    if not text.strip():
        raise AssetError(
            f"{os.fspath(source)!r}, split {split!r}, is empty: 0 tokens found, {seq_len} needed"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = [_window(tokenizer, text, rng, seq_len) for _ in range(num_samples)]
    windows = [window for window in drawn if window is not None]
    if len(windows) < num_samples:
        windows = _windows_of_short_text(tokenizer, text, rng, (num_samples, seq_len), os.fspath(source))
    return torch.tensor(windows, dtype=torch.int64)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _window(
    tokenizer: PreTrainedTokenizerBase, text: str, rng: np.random.Generator, seq_len: int
) -> list[int] | None:
    """One window, or None when after many draws none had enough text behind it."""
    for _ in range(_ATTEMPTS):
        start = _next_word(text, int(rng.integers(len(text))))
        span = _CHARACTERS_PER_TOKEN * seq_len
        while start < len(text):
            ids = _encode(tokenizer, text[start : start + span])
            # One token more than needed: the last one may have been cut short by the span.
            if len(ids) > seq_len:
                return ids[:seq_len]
            if start + span >= len(text):
                break
            span *= 2
    return None


def _next_word(text: str, position: int) -> int:
    """First position from ``position`` on where a word begins, its leading space included."""
    while position < len(text) and not text[position].isspace():
        position += 1
    return position


def _windows_of_short_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    rng: np.random.Generator,
    shape: tuple[int, int],
    source: str,
) -> list[list[int]]:
    """Windows over the tokens of the whole text."""
    num_samples, seq_len = shape
    ids = _encode(tokenizer, text)
    if len(ids) < seq_len:
        raise AssetError(
            f"{source!r} is too short: {len(ids)} tokens found, {seq_len} needed for one window. "
            "Give a longer text or a smaller seq_len."
        )
    starts = rng.integers(len(ids) - seq_len + 1, size=num_samples)
    return [ids[start : start + seq_len] for start in starts]
