"""Whether a configuration says a model's sizes, tried without weights."""

from __future__ import annotations

import json

from transformers import PreTrainedConfig, PreTrainedModel

from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.pruning.configuration import build_empty, saved_and_read, shapes_of
from pruner_lib.pruning.layer_config import enable_per_layer_config


def check_saveable(model: PreTrainedModel, *, weights: bool = True) -> None:
    """Raise unless a configuration read back from its file builds exactly this model.

    Args:
        model: any object, so that what is no model is refused in words.
        weights: also refuse the meta device.

    Raises:
        CheckpointError: see :func:`save_pruned`.
    """
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"cannot save a {type(model).__name__}: a transformers model is needed; "
            "merge adapters first (recover returns .model merged)"
        )
    if weights and any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("cannot save a model on the meta device: it has shapes but no weights")
    enable_per_layer_config()
    config = saved_and_read(model.config)
    empty = None if config is None else build_empty(type(model), config)
    found, wanted = {} if empty is None else shapes_of(empty), shapes_of(model)
    differing = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if differing:
        _check_other_reasons(model, set(differing))
        name = differing[0]
        raise CheckpointError(
            f"cannot save this {type(model).__name__}: its configuration has no way to say the new sizes, so "
            f"no from_pretrained could open it ({name} is {wanted.get(name, 'no part of it')}, the "
            f"configuration builds {found.get(name, 'no model')}). It works in memory; to save, cut "
            f"families whose size the configuration of {model.config.model_type} states"
        )


def _check_other_reasons(model: PreTrainedModel, differing: set[str]) -> None:
    """Raise where it is not the sizes that the configuration does not say."""
    start = f"cannot save this {type(model).__name__}: "
    # PEFT is not imported for this: its layers keep the given one under this name.
    adapted = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    if adapted:
        raise CheckpointError(
            f"{start}an adapter is attached (in {len(adapted)} layers, the first is "
            f"{adapted[0].removesuffix('.base_layer')}), and no configuration builds one; put the adapter on "
            "the model it was made for with attach_adapter, and save what merge_adapter returns"
        )
    if unsayable := _unsayable(model.config):
        raise CheckpointError(
            f"{start}its configuration holds what JSON cannot say: {', '.join(unsayable)}; delete these "
            "attributes of model.config, or make them plain numbers, strings, lists or dicts"
        )
    if _is_untied(model, differing):
        raise CheckpointError(
            f"{start}its configuration says tie_word_embeddings=True, but the output head has a weight of "
            "its own, which from_pretrained would replace by the embedding; set "
            "model.config.tie_word_embeddings = False, or tie them again with model.tie_weights()"
        )


def _unsayable(config: PreTrainedConfig) -> list[str]:
    """Entries of a configuration, with their types, that its JSON file cannot hold."""
    found = []
    for name, value in config.to_dict().items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            found.append(f"{name} ({type(value).__name__})")
    return found


def _is_untied(model: PreTrainedModel, differing: set[str]) -> bool:
    """Whether all that differs is a head that the configuration says to be the embedding."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    names = {name for name, parameter in model.named_parameters() if parameter is head}
    return bool(getattr(model.config, "tie_word_embeddings", False)) and differing <= names
