"""Checkpoints: save a pruned model whole or not at all, load it without unpickling, take it elsewhere."""

from pruner_lib.pruning.layer_config import enable_per_layer_config

from .compatibility import Compatibility, compatibility
from .errors import CheckpointError
from .foresight import Foresight
from .gguf_export import GGUF_DTYPES, export_gguf
from .gguf_quality import GgufQuality, measure_gguf
from .llama_cpp import LlamaCpp
from .loading import load_pruned
from .saving import save_pruned

__all__ = [
    "GGUF_DTYPES",
    "CheckpointError",
    "Compatibility",
    "Foresight",
    "GgufQuality",
    "LlamaCpp",
    "compatibility",
    "enable_per_layer_config",
    "export_gguf",
    "load_pruned",
    "measure_gguf",
    "save_pruned",
]

enable_per_layer_config()
