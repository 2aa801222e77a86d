"""Whether a configuration says a model's sizes, tried without weights."""

from __future__ import annotations

from transformers import PreTrainedModel

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
        name = differing[0]
        raise CheckpointError(
            f"cannot save this {type(model).__name__}: its configuration has no way to say the new sizes, so "
            f"no from_pretrained could open it ({name} is {wanted.get(name, 'no part of it')}, the "
            f"configuration builds {found.get(name, 'no model')}). It works in memory; to save, cut "
            f"families whose size the configuration of {model.config.model_type} states"
        )
