"""What llama.cpp computes by itself must be what a model computes: activation, rotation, scales, norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pruner_lib.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from pruner_lib.checkpoint.gguf_layout import Dialect

_ROTATIONS = ("default", "linear", "llama3")


def check_numbers(
    model: PreTrainedModel, dialect: Dialect, head_dim: int, factors: torch.Tensor | None
) -> None:
    """Refuse a model that llama.cpp would run otherwise.

    Args:
        model: the model.
        dialect: what llama.cpp computes.
        head_dim: channels of a head.
        factors: see :func:`rope_factors`.

    Raises:
        CheckpointError: with everything that it has no way to say.
    """
    config: Any = model.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    embedding: Any = model.get_input_embeddings()
    hidden, scale = embedding.weight.shape[1], getattr(embedding, "scalar_embed_scale", None)
    theirs = f"rotary frequencies of type {config.rope_parameters.get('rope_type')!r}"
    causal = [getattr(config, "is_causal", True), not getattr(config, "use_bidirectional_attention", False)]
    causal += [getattr(block, "is_causal", True) for block in _attentions(model)]
    scalings = {float(block.scaling) for block in _attentions(model) if hasattr(block, "scaling")}
    problems = {
        f"the activation {activation!r} (its own is {dialect.activations[0]})":
            activation not in dialect.activations,
        f"another function in a layer's act_fn than {activation!r}":
            activation in dialect.activations and _acts_otherwise(model, activation),
        f"{theirs} (its own are those of the base alone)":
            factors is not None and not dialect.rope_factors,
        f"rotary positions on a part of the head ({config.rope_parameters.get('partial_rotary_factor')})":
            config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
        f"a sliding window of {window} tokens, shorter than the context":
            window is not None and window < config.max_position_embeddings,
        "attention in both directions":
            not all(causal),
        f"a softmax scale of {sorted(scalings)} with heads of {head_dim} channels":
            any(abs(scaling * head_dim**0.5 - 1) > 1e-6 for scaling in scalings),
        f"an embedding scale of {scale} with {hidden} residual channels":
            scale is not None and abs(float(scale) / hidden**0.5 - 1) > 1e-3,
    }  # fmt: skip
    found = [words for words, wrong in problems.items() if wrong]
    if found:
        raise CheckpointError(
            f"cannot export this {config.model_type} model to GGUF: llama.cpp's {dialect.name} has no way to "
            f"say {'; nor '.join(found)}"
        )


def _attentions(model: PreTrainedModel) -> list[Any]:
    return [block.self_attn for block in model.model.layers if hasattr(block, "self_attn")]


def _acts_otherwise(model: PreTrainedModel, activation: str) -> bool:
    """True when a layer's activation was replaced by another function."""
    gelu = "gelu" in activation
    probe = torch.linspace(-6.0, 6.0, 49)
    expected = functional.gelu(probe, approximate="tanh") if gelu else functional.silu(probe)
    tolerance = 1e-3 if gelu else 1e-6  # the exact GELU and its approximations lie so far apart
    functions = [getattr(getattr(block, "mlp", None), "act_fn", None) for block in model.model.layers]
    return any(
        not torch.allclose(act(probe), expected, rtol=0, atol=tolerance)
        for act in functions
        if act is not None
    )


def epsilon_of_norms(model: PreTrainedModel) -> float:
    """The one ε that all RMS norms add, read off the modules.

    Raises:
        CheckpointError: several.
    """
    found = {
        float(getattr(module, name))
        for module in model.modules()
        for name in ("variance_epsilon", "eps")
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, name)
    }
    if len(found) > 1:
        raise CheckpointError(
            f"cannot export to GGUF: the norms add {', '.join(map(str, sorted(found)))} to the variance, and "
            "llama.cpp has one number for all of them"
        )
    return found.pop() if found else float(model.config.rms_norm_eps)


def rope_factors(model: PreTrainedModel, head_dim: int) -> torch.Tensor | None:
    """What the model's rotary frequencies are divided by, beyond those of the base.

    Read off the table that the model uses, which may have been cut. Where it differs from what the
    configuration says by rounding alone (a model cast to bfloat16 rounds its table, too), the
    configuration's are taken.

    Returns:
        ``[head_dim / 2]``; None for all ones.

    Raises:
        CheckpointError: a kind of frequencies that depends on the length, or none.
    """
    config: Any = model.config
    said = getattr(config, "rope_parameters", None) or {}
    kind = said.get("rope_type", "default")
    if "rope_theta" not in said or kind not in _ROTATIONS:
        found = f"of type {kind!r}" if said else "that its configuration does not describe"
        raise CheckpointError(
            f"cannot export this {config.model_type} model to GGUF: rotary positions {found}; those of type "
            f"{', '.join(_ROTATIONS)} work"
        )
    plain = float(said["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    table, factors = model.model.rotary_emb.inv_freq, None
    if kind == "default":
        factors = torch.ones(len(plain))
    else:
        described = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
        if len(described) == len(plain):
            factors = (plain / described.double()).float()
    if not table.is_meta:  # else asked for the layout alone
        used = (plain / table.detach().double().cpu()).float()
        rounding = max(1e-5, torch.finfo(table.dtype).eps)
        if factors is None or not torch.allclose(used, factors, rtol=rounding, atol=0):
            factors = used
    return (
        None if factors is None or torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors
    )
