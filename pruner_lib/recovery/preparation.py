"""From data to the rows that a model is trained on, and what that model must be able to read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pruner_lib.recovery.data import Example, TrainingData, make_examples
from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.packing import keeps_apart, pack
from pruner_lib.recovery.settings import RecoverySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    settings: RecoverySettings,
) -> list[Example]:
    """Examples of the settings' length, checked against the model and packed where it pays.

    Where the model cannot keep packed examples apart they are padded instead, with a warning.

    Raises:
        RecoveryError: see :func:`make_examples`; tokens outside the vocabulary, sequences beyond the
            context.
    """
    examples = make_examples(tokenizer, data, seq_len=settings.seq_len, template=settings.template)
    check_against(model, examples)
    if not settings.packing or isinstance(data, (str, Tensor)):  # text fills its rows; ids are taken as given
        return examples
    rows = pack(examples, settings.seq_len)
    if len(rows) == len(examples):
        return examples
    if not keeps_apart(model, examples):
        warnings.warn(
            f"{type(model).__name__} does not keep examples in one row apart, so they are padded instead of "
            "packed; set packing=False to say so yourself",
            stacklevel=3,
        )
        return examples
    return rows


def require_weights(model: nn.Module) -> None:
    """Refuse a model on the meta device."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RecoveryError(
            "the model is on the meta device and has no weights to train; load it with load_model"
        )


def check_against(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse tokens or lengths that this model cannot read."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    low = min(int(example.input_ids.min()) for example in examples)
    high = max(int(example.input_ids.max()) for example in examples)
    if low < 0 or (size is not None and high >= size):
        raise RecoveryError(
            f"the data holds token id {low if low < 0 else high}, outside the model's vocabulary "
            f"(0 to {(size or 0) - 1}); use the tokenizer that belongs to this model"
        )
    longest = max(len(example) for example in examples)
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise RecoveryError(
            f"the longest sequence has {longest} tokens, beyond the model's context of {context}; lower "
            "seq_len"
        )


def pad_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any valid id will do: padding is masked in attention and in the loss."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0
