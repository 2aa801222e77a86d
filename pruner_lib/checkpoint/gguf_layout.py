"""How a model's widths and numbers are said in GGUF, or which of them cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pruner_lib.checkpoint.errors import CheckpointError

_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Dialect:
    """One of transformers' architectures as llama.cpp knows it.

    Attributes:
        name: llama.cpp's architecture for one width in all layers.
        varying: its architecture for widths that differ from layer to layer; None if there is none.
        interleaved: llama.cpp rotates neighbouring channels, transformers channel i with i + d/2.
        norm_offset: added to norm weights (Gemma's code multiplies by 1 + weight).
        activations: values of ``hidden_act`` whose function llama.cpp has built in for it.
    """

    name: str
    varying: str | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")


DIALECTS: Mapping[str, Dialect] = {
    "llama": Dialect("llama", varying="deci", interleaved=True),
    "mistral": Dialect("llama", varying="deci", interleaved=True),
    # llama.cpp's own qwen2 wants heads times head_dim to be the residual width, which pruning ends; its llama
    # takes the biases of q, k and v as well.
    "qwen2": Dialect("llama", varying="deci", interleaved=True),
    "qwen3": Dialect("qwen3"),
    "gemma": Dialect(
        "gemma", norm_offset=1.0, activations=("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")
    ),
}


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer; 0 heads: no attention, 0 neurons: no MLP."""

    heads: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class Layout:
    """Everything of a model, besides its weights, that a GGUF file says.

    Attributes:
        architecture: llama.cpp's name: ``llama``, ``deci``, ``qwen2`` …
        dialect: how its weights are laid out.
        layers: widths, layer by layer.
        hidden: residual channels.
        head_dim: channels of a head, of queries, keys and values alike.
        vocabulary: rows of the embedding.
        context: longest input in tokens.
        epsilon: of the RMS norms.
        rope_theta: base of the rotary frequencies.
        rope_factors: ``[head_dim / 2]``, what divides the frequencies of that base; None for all ones.
    """

    architecture: str
    dialect: Dialect
    layers: tuple[LayerWidths, ...]
    hidden: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    rope_theta: float
    rope_factors: torch.Tensor | None

    @property
    def uniform(self) -> bool:
        """One width per kind in all layers."""
        return len(set(self.layers)) == 1


def describe(model: PreTrainedModel) -> Layout:
    """Read a model's layout off its weights and numbers.

    Widths come from the shapes of the weights, since a configuration may say them per layer or not at all.

    Raises:
        CheckpointError: llama.cpp's file format has no place for something in the model; says for what.
    """
    config: Any = getattr(model, "config", None)
    dialect = DIALECTS.get(getattr(config, "model_type", ""))
    if dialect is None:
        kind = getattr(config, "model_type", type(model).__name__)
        raise CheckpointError(
            f"cannot export a {kind} model to GGUF: no mapping of its weights was verified in llama.cpp; "
            f"known are {', '.join(DIALECTS)}"
        )
    blocks = list(model.model.layers)
    head_dim = _one(
        "head_dim", {int(block.self_attn.head_dim) for block in blocks if _weight(block, "self_attn.q_proj")}
    )
    layers = tuple(_widths(block, index, head_dim) for index, block in enumerate(blocks))
    _check_numbers(model, config, dialect, head_dim)
    rope, (rows, hidden) = config.rope_parameters, _embedding(model).weight.shape
    return Layout(
        architecture=_architecture(config.model_type, dialect, layers),
        dialect=dialect,
        layers=layers,
        hidden=hidden,
        head_dim=head_dim,
        vocabulary=rows,
        context=int(config.max_position_embeddings),
        epsilon=float(config.rms_norm_eps),
        rope_theta=float(rope["rope_theta"]),
        rope_factors=_rope_factors(model, float(rope["rope_theta"]), head_dim),
    )


def _embedding(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()


def _weight(block: Any, name: str) -> tuple[int, ...] | None:
    """Shape of a projection in a decoder layer; None where the sublayer is gone."""
    module = block
    for part in name.split("."):
        module = getattr(module, part, None)
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


def _widths(block: Any, index: int, head_dim: int) -> LayerWidths:
    shapes = {name: _weight(block, name) for name in (*_ROTATED, "self_attn.v_proj", "mlp.gate_proj")}
    query, key, value, gate = shapes.values()
    rows = {name: shape[0] for name, shape in shapes.items() if shape is not None}
    if query is not None and (key is None or value is None or key != value or query[0] % head_dim):
        raise CheckpointError(
            f"cannot export layer {index} to GGUF: it has {rows} rows, where llama.cpp wants heads of "
            f"{head_dim} channels, the same for queries, keys and values"
        )
    heads = query[0] // head_dim if query is not None else 0
    kv_heads = key[0] // head_dim if query is not None and key is not None else 0
    return LayerWidths(heads, kv_heads, gate[0] if gate is not None else 0)


def _one(what: str, found: set[int]) -> int:
    if len(found) != 1:
        raise CheckpointError(
            f"cannot export to GGUF: {what} must be one number in all layers, found {sorted(found) or 'none'}"
        )
    return next(iter(found))


def _architecture(model_type: str, dialect: Dialect, layers: tuple[LayerWidths, ...]) -> str:
    if len(set(layers)) == 1 and layers[0].heads and layers[0].neurons:
        return dialect.name
    if dialect.varying is not None:
        return dialect.varying
    differing = [
        f"{words} ({', '.join(map(str, counts))})"
        for words, field in (("query heads", "heads"), ("KV heads", "kv_heads"), ("MLP neurons", "neurons"))
        if len(counts := sorted({getattr(layer, field) for layer in layers})) > 1
    ]
    raise CheckpointError(
        f"cannot export this {model_type} model to GGUF: its layers differ in {', '.join(differing)}, and "
        f"llama.cpp's {dialect.name} has one number for all layers. Only llama, mistral and qwen2 models may "
        "differ from layer to layer (its deci architecture). Prune with one width per kind in all layers"
    )


def _check_numbers(model: PreTrainedModel, config: Any, dialect: Dialect, head_dim: int) -> None:
    """What llama.cpp computes by itself must be what this model computes."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    kind = getattr(config, "rope_parameters", {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    scale = getattr(_embedding(model), "scalar_embed_scale", None)
    hidden = _embedding(model).weight.shape[1]
    scalings = {float(block.self_attn.scaling) for block in model.model.layers if hasattr(block, "self_attn")
                and hasattr(block.self_attn, "scaling")}  # fmt: skip
    problems = {
        f"the activation {activation!r} (its own is {dialect.activations[0]})":
            activation not in dialect.activations,
        f"rotary positions of type {kind!r} (default, linear and llama3 work)":
            kind not in ("default", "linear", "llama3"),
        f"rotary positions on a part of the head ({config.rope_parameters.get('partial_rotary_factor')})":
            config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
        f"a sliding window of {window} tokens, shorter than the context":
            window is not None and window < config.max_position_embeddings,
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


def _rope_factors(model: PreTrainedModel, theta: float, head_dim: int) -> torch.Tensor | None:
    """What the model's rotary frequencies are divided by, read off the table it uses."""
    table = model.model.rotary_emb.inv_freq
    if table.is_meta:  # asked for the layout alone
        return None
    used = table.detach().float().cpu()
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = (plain / used.double()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order.

    transformers rotates channel i of a head together with channel i + d/2, llama.cpp channel 2i with
    2i + 1, so within each head ``[0, 1, …, d-1]`` becomes ``[0, d/2, 1, d/2 + 1, …]``.

    Args:
        rows: weight ``[heads * d, n]`` or bias ``[heads * d]``.
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
