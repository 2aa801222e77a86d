"""Everything that can be measured about several models, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruner_lib.evaluation.cost import count_cost
from pruner_lib.evaluation.generation import generate
from pruner_lib.evaluation.latency import measure_latency
from pruner_lib.evaluation.memory import measure_memory
from pruner_lib.evaluation.perplexity import Perplexity, perplexity
from pruner_lib.evaluation.report import EvaluationReport, EvaluationRow
from pruner_lib.evaluation.running import (
    EvaluationError,
    check_device,
    check_models,
    context_length,
    require_cache,
)
from pruner_lib.evaluation.zero_shot import zero_shot as score_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = str | Tensor | Mapping[str, str | Tensor]
Arguments = Mapping[str, Any]


def evaluate(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: Texts | None = None,
    seq_len: int | Sequence[int] = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    bos: bool = False,
    cost_at: tuple[int, int] = (1, 64),
    zero_shot: Arguments | None = None,
    memory: Arguments | None = None,
    latency: Arguments | None = None,
    generation: Arguments | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> EvaluationReport:
    """Cost and perplexity of any number of models on the same tokens, and what else is asked for.

    The last four measurements are left out unless their arguments are given, ``{}`` for the defaults:

        evaluate({"dense": model, "pruned": smaller}, tokenizer,
                 text={"wikitext2 test": load_text("wikitext2", "test")}, seq_len=(128, 1024),
                 zero_shot={"limit": 200}, memory={}, latency={"batch_sizes": (1, 4)},
                 generation={"prompts": ["The sea is"]})

    Args:
        models: by name; the first is what ratios and changes are taken to.
        tokenizer: shared by all; may be None without text, tasks and prompts, or with token ids.
        text: a text, token ids, or ``{"wikitext2 test": text, …}`` for several; None for cost alone.
        seq_len: window of the perplexity in tokens, or several; of several, those beyond a model's
            context are left out for it.
        max_tokens: tokens of each text to read; None for all.
        batch_size: windows run at once.
        bos: as in :func:`perplexity`.
        cost_at: batch size and sequence length at which multiply-accumulates are counted.
        zero_shot: arguments of :func:`zero_shot`.
        memory: arguments of :func:`measure_memory`.
        latency: arguments of :func:`measure_latency`.
        generation: arguments of :func:`generate`, ``prompts`` among them.
        device: where all models must be; None takes them where they are.
        progress: show bars while perplexities are measured.

    Raises:
        EvaluationError: no models, or what the single functions refuse; names the model.
    """
    checked = check_models(models)
    texts = {} if text is None else dict(text) if isinstance(text, Mapping) else {"text": text}
    lengths = (seq_len,) if isinstance(seq_len, int) else tuple(seq_len)
    options = {"max_tokens": max_tokens, "batch_size": batch_size, "bos": bos, "progress": progress}
    for name, model in checked.items():
        with _naming(name):  # before anything is measured: hours of it would be lost
            check_device(model, device)
            if memory is not None or latency is not None:
                require_cache(model, "measuring memory or latency")
    rows = []
    for name, model in checked.items():
        with _naming(name):
            row = EvaluationRow(
                name,
                count_cost(model, batch_size=cost_at[0], seq_len=cost_at[1]),
                _perplexities(model, tokenizer, texts, lengths, options),
                None if zero_shot is None else score_tasks(model, _needed(tokenizer), **zero_shot),
                None if memory is None else measure_memory(model, **memory),
            )
        rows.append(row)
    return EvaluationReport(
        tuple(rows),
        None if latency is None else measure_latency(checked, **latency),
        None if generation is None else generate(checked, _needed(tokenizer), **generation),
    )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the model's name before what is refused."""
    try:
        yield
    except EvaluationError as error:
        raise EvaluationError(f"model {name!r}: {error}") from error


def _perplexities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Mapping[str, str | Tensor],
    lengths: Sequence[int],
    options: Mapping[str, Any],
) -> dict[str, Perplexity]:
    """Of each text at each window length that the model allows."""
    if len(lengths) > 1:
        longest = context_length(model)
        lengths = [length for length in lengths if longest is None or length <= longest] or [min(lengths)]
        titled = {f"{source}, {length}": (source, length) for source in texts for length in lengths}
    else:
        titled = {source: (source, length) for source in texts for length in lengths}
    return {
        title: perplexity(model, tokenizer, texts[source], seq_len=length, source=source, **options)
        for title, (source, length) in titled.items()
    }


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise EvaluationError("zero-shot tasks and generation need the models' tokenizer; give it")
    return tokenizer
