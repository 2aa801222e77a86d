"""Perplexity over non-overlapping windows, with everything one must know to compare it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from pruner_lib.evaluation.running import (
    EvaluationError,
    check_vocabulary,
    context_length,
    evaluating,
    require_weights,
    weight_dtype,
)
from pruner_lib.importance.calibration import logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its conditions. ``float(p)`` and ``f"{p:.1f}"`` give the bare number.

    Attributes:
        value: exp of the mean negative log-likelihood per predicted token.
        num_tokens: predicted tokens; each window predicts ``seq_len - 1``.
        seq_len: tokens per window, a BOS token included if there is one.
        dtype: of the model's weights, such as ``float32``.
        bos: whether every window began with the tokenizer's BOS token.
        source: what the text was, such as ``"wikitext2 test"``; None if not said.
    """

    value: float
    num_tokens: int
    seq_len: int
    dtype: str
    bos: bool = False
    source: str | None = None

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return f"perplexity {self.value:.2f} ({self.conditions})"

    @property
    def conditions(self) -> str:
        """Data set, window, predicted tokens, BOS policy and dtype in one line."""
        where = f"{self.source}, " if self.source else ""
        bos = "BOS before each window" if self.bos else "no BOS"
        return f"{where}windows of {self.seq_len}, {self.num_tokens:,} tokens predicted, {bos}, {self.dtype}"


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Tensor,
    *,
    seq_len: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    bos: bool = False,
    source: str | None = None,
    progress: bool = False,
) -> Perplexity:
    r"""Perplexity on non-overlapping windows of a text.

    The text becomes one stream of tokens, cut into W windows of L = ``seq_len`` tokens; what is left
    at the end is dropped, so nothing is ever padded. Windows do not see each other. With x a window's tokens

        PPL = exp( − 1 / (W (L − 1)) · Σ_windows Σ_{t=2..L} log p(x_t | x_1 … x_{t−1}) )

    Log-probabilities are taken in float32 or wider whatever the model's dtype, and added up in
    float64. No special token is added to the text. With ``bos`` each window is the BOS token and L − 1
    tokens of the text, so that the first of these is predicted too.

    Args:
        model: a causal language model, or any module that maps token ids to logits; left as it was, in
            training mode or not.
        tokenizer: the model's own; may be None when ``text`` is token ids and ``bos`` is off.
        text: a string, token ids ``[T]`` of one stream, or ``[N, T]`` of N separate ones.
        seq_len: window length L in tokens, at least 2.
        max_tokens: read no more tokens of the text than this (whole windows); None reads all.
        batch_size: windows run at once; the result does not depend on it but for rounding.
        bos: begin each window with the tokenizer's BOS token, as Gemma wants.
        source: what the text is, for the record.
        progress: show a bar with the time left.

    Returns:
        The value with its conditions.

    Raises:
        EvaluationError: empty text, too few tokens for one window, seq_len beyond the model's
            context, token ids outside its vocabulary, no BOS token where one is asked for.
        FloatingPointError: the loss of a window is NaN or infinite.

    Source: LLM-Pruner (arXiv 2305.11627) measures WikiText-2 in windows of 128 tokens.
    """
    require_weights(model, "perplexity")
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, not {batch_size}")
    _check_length(model, seq_len)
    rows = _token_rows(tokenizer, text)
    windows = _windows(rows, seq_len - bos, max_tokens)
    if bos:
        first = torch.full((len(windows), 1), _bos_token(tokenizer), dtype=torch.long)
        windows = torch.cat([first, windows], dim=1)
    check_vocabulary(model, int(windows.min()), int(windows.max()), "the text")
    total = 0.0
    starts = tqdm(range(0, len(windows), batch_size), desc=f"perplexity {source or ''}", disable=not progress)
    with evaluating(model):
        for start in starts:
            total += _negative_log_likelihood(model, windows[start : start + batch_size], start)
    num_tokens = windows.shape[0] * (seq_len - 1)
    return Perplexity(_exp(total / num_tokens), num_tokens, seq_len, weight_dtype(model), bos, source)


def _check_length(model: nn.Module, seq_len: int) -> None:
    if seq_len < 2:
        raise EvaluationError(
            f"seq_len must be at least 2 (each token is predicted from earlier ones), not {seq_len}"
        )
    longest = context_length(model)
    if longest is not None and seq_len > longest:
        raise EvaluationError(
            f"seq_len {seq_len} is beyond the model's context of {longest} tokens; use seq_len={longest} or "
            "less"
        )


def _token_rows(tokenizer: PreTrainedTokenizerBase | None, text: str | Tensor) -> Tensor:
    """Token ids ``[N, T]``: one row per stream."""
    if isinstance(text, str):
        if not text.strip():
            raise EvaluationError("the text is empty; give some, for example load_text('wikitext2', 'test')")
        if tokenizer is None:
            raise EvaluationError("a string needs the model's tokenizer; give it, or give token ids")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)
    if not isinstance(text, Tensor) or text.is_floating_point() or text.ndim not in (1, 2):
        found = f"{text.dtype} {list(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
        raise EvaluationError(f"text must be a string or integer token ids [T] or [N, T]; got {found}")
    if text.numel() == 0:
        raise EvaluationError(f"the text is empty: token ids of shape {list(text.shape)}")
    return text.detach().to("cpu", torch.long).reshape(-1, text.shape[-1])


def _windows(rows: Tensor, length: int, max_tokens: int | None) -> Tensor:
    """Whole windows ``[W, length]`` from each row, in order; row ends that fill none are dropped."""
    per_row = rows.shape[1] // length
    if per_row == 0:
        raise EvaluationError(
            f"the text has {rows.shape[1]} tokens{' in each row' if len(rows) > 1 else ''}, too few for one "
            f"window of {length}; give more text or a smaller seq_len"
        )
    windows = rows[:, : per_row * length].reshape(-1, length)
    if max_tokens is None:
        return windows
    if max_tokens < length:
        raise EvaluationError(f"max_tokens {max_tokens} is less than one window of {length} tokens; raise it")
    return windows[: max_tokens // length]


def _bos_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise EvaluationError("bos=True, but the tokenizer has no BOS token; leave bos off")
    return int(token)


def _negative_log_likelihood(model: nn.Module, batch: Tensor, start: int) -> float:
    """Sum of −log p over every predicted token of a batch ``[B, L]``."""
    logits = logits_of(model, batch)[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = batch[:, 1:].to(wide.device)
    losses = functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").double()
    total = losses.sum().item()
    if not math.isfinite(total):
        row = int((~torch.isfinite(losses.view(targets.shape)).all(1)).nonzero()[0])
        raise FloatingPointError(
            f"the loss of window {start + row} (of {batch.shape[1]} tokens) is not finite in "
            f"{weight_dtype(model)}; "
            "try float32 or bfloat16, and look for NaN in the weights"
        )
    return total


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf
