"""The same model under the name of an architecture whose configuration may say its sizes."""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig, PreTrainedConfig

from pruner_lib.pruning.layer_config import MARK, is_marked


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A configuration that plain transformers reads, for a model that computes the same.

    LlamaConfig refuses a residual width that is no multiple of the head count (32 heads of LLaMA-7B,
    24 of them left: 4096 / 24), although its own code runs with it. Mistral's model is Llama's with
    an optional sliding window and without biases, and its configuration has no such check.

    Args:
        config: of a pruned model.

    Returns:
        The other configuration, or None: the model needs none, or there is none that says it.
    """
    if not is_marked(config) or config.is_heterogeneous or config.model_type != "llama":
        return None
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return None
    entries: dict[str, Any] = {
        name: value for name, value in config.to_dict().items() if name not in (MARK, *_ONLY_LLAMA)
    }
    return MistralConfig(**{**entries, "sliding_window": None, "architectures": ["MistralForCausalLM"]})


_ONLY_LLAMA = ("attention_bias", "mlp_bias", "pretraining_tp", "model_type")


def needs_library(config: PreTrainedConfig) -> bool:
    """True when a checkpoint of this model opens only where ``pruner_lib`` is imported."""
    return is_marked(config) and twin_config(config) is None
