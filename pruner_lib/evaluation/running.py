"""Running a model to measure it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from pruner_lib.importance.calibration import accepted

Value = TypeVar("Value")


class EvaluationError(ValueError):
    """Something cannot be measured; the message says what was found and what to do."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode (no dropout) and no gradients; each module's training flag comes back after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


def input_device(model: nn.Module) -> torch.device:
    """Device of the token embedding, where token ids must be."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return weight.device if weight is not None else next(model.parameters()).device


def check_device(model: nn.Module, device: str | torch.device | None) -> None:
    """Refuse a model that is elsewhere than asked for; None asks for nothing.

    Raises:
        EvaluationError: the model is on another device, or torch does not know the one asked for.
    """
    if device is None:
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise EvaluationError(
            f"device {device!r} is unknown to torch; give 'cpu', 'cuda' or 'cuda:0'"
        ) from error
    found = input_device(model)
    if found.type != wanted.type or (wanted.index is not None and found.index != wanted.index):
        raise EvaluationError(
            f"{wanted} was asked for, but the model is on {found}; move it with model.to({str(wanted)!r}), "
            "or leave device out to measure it where it is"
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the token embedding; None for a model that has none."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embedding, "num_embeddings", None)


def check_vocabulary(model: nn.Module, lowest: int, highest: int, what: str) -> None:
    """Refuse token ids that the model has no embedding for: the sign of another model's tokenizer.

    Args:
        model: whose embedding counts.
        lowest: smallest token id.
        highest: largest token id.
        what: where the ids are from, for the message.

    Raises:
        EvaluationError: names the id and the vocabulary.
    """
    size = vocabulary_size(model)
    if lowest < 0 or (size is not None and highest >= size):
        raise EvaluationError(
            f"{what} holds token id {lowest if lowest < 0 else highest}, outside the model's vocabulary "
            f"(0 to {(size or 0) - 1}); use the tokenizer that belongs to this model"
        )


def context_length(model: nn.Module) -> int | None:
    """Longest input the model's configuration allows, in tokens; None if it does not say."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None)


def check_counts(counts: Mapping[str, tuple[int, int]]) -> None:
    """Refuse numbers below their minimum.

    Args:
        counts: what it is called, to (number, least number).

    Raises:
        EvaluationError: names the number.
    """
    for label, (value, least) in counts.items():
        if value < least:
            raise EvaluationError(f"{label} must be at least {least}, not {value}")


def check_context(model: nn.Module, tokens: int, what: str) -> None:
    """Refuse more tokens than the model's configuration allows.

    Raises:
        EvaluationError: says the context's length.
    """
    longest = context_length(model)
    if longest is not None and tokens > longest:
        raise EvaluationError(
            f"{what} are {tokens} tokens, beyond the model's context of {longest}; use fewer"
        )


def weight_dtype(model: nn.Module) -> str:
    """Type of the floating-point weights, such as ``float32``; joined by + if there are several."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "+".join(sorted(found)) or "none"


def require_weights(model: nn.Module, what: str) -> None:
    """Refuse a model on the meta device.

    Raises:
        EvaluationError: a parameter has no values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise EvaluationError(
            f"{what} needs a model with weights, but this one is on the meta device; load it with "
            "load_model, "
            "or ask count_cost, which needs none"
        )


def keeps_last_logits(model: nn.Module) -> bool:
    """Whether ``forward`` can be asked for the logits of the last positions alone."""
    return "logits_to_keep" in accepted(model)[0]


def last_logits(model: nn.Module) -> dict[str, int]:
    """The argument of ``forward`` that asks for the last position's logits, where the model takes it."""
    return {"logits_to_keep": 1} if keeps_last_logits(model) else {}


def require_cache(model: nn.Module, what: str) -> None:
    """Refuse a model that cannot decode token by token; runs one token through it.

    Raises:
        EvaluationError: says which argument of ``forward`` or part of its output is missing.
    """
    require_weights(model, what)
    name = type(model).__name__
    named, open_ended = accepted(model)
    needed = ("input_ids", "use_cache", "past_key_values")
    missing = [] if open_ended else [argument for argument in needed if argument not in named]
    found = f"{name}.forward takes {', '.join(sorted(named))}, but not {' and '.join(missing)}"
    if not missing:
        token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
        with evaluating(model):
            output = model(input_ids=token, use_cache=True, **last_logits(model))
        parts = ("logits", "past_key_values")
        missing = [part for part in parts if getattr(output, part, None) is None]
        found = f"with use_cache=True {name} returned {type(output).__name__} without {' and '.join(missing)}"
    if missing:
        raise EvaluationError(
            f"{what} decodes with a KV cache, as the models of transformers do; {found}. Leave it out for "
            "this model; cost and perplexity need no cache"
        )


def check_models(models: Mapping[str, Value]) -> dict[str, Value]:
    """The models by name, in their order.

    Raises:
        EvaluationError: not a mapping, or empty.
    """
    if not isinstance(models, Mapping):
        raise EvaluationError(f'give the models as {{"dense": model, …}}, not {type(models).__name__}')
    if not models:
        raise EvaluationError('no model was given; give at least one, as {"dense": model}')
    return dict(models)
