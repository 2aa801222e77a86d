"""Checkpoints: save a pruned model whole or not at all, and load it without ever unpickling."""

from pruner_lib.pruning.layer_config import enable_per_layer_config

from .errors import CheckpointError
from .loading import load_pruned
from .saving import save_pruned

__all__ = ["CheckpointError", "enable_per_layer_config", "load_pruned", "save_pruned"]

enable_per_layer_config()
