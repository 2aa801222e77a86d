"""How a model's widths and numbers are said in GGUF, or which of them cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.gguf_numbers import check_numbers, epsilon_of_norms, rope_factors

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
        biases: whether projections may have biases.
        rope_factors: whether rotary frequencies may be divided by factors of their own.
    """

    name: str
    varying: str | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    biases: bool = False
    rope_factors: bool = False


_LLAMA = Dialect("llama", varying="deci", interleaved=True, biases=True, rope_factors=True)
DIALECTS: Mapping[str, Dialect] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    # llama.cpp's own qwen2 wants heads times head_dim to be the residual width, which pruning ends; its llama
    # takes the biases of q, k and v as well.
    "qwen2": _LLAMA,
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
        tied: whether the output head is the embedding.
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
    tied: bool

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
    head = model.get_output_embeddings()
    if head is None or not hasattr(model, "model"):
        raise CheckpointError(
            f"cannot export a {type(model).__name__} to GGUF: it has no output head; give the causal "
            "language model (AutoModelForCausalLM)"
        )
    body: Any = model.model
    blocks = list(body.layers)
    head_dim = _head_dim(config, blocks)
    layers = tuple(_widths(block, index, head_dim) for index, block in enumerate(blocks))
    factors = rope_factors(model, head_dim)
    check_numbers(model, dialect, head_dim, factors)
    embedding: Any = model.get_input_embeddings().weight
    rows, hidden = embedding.shape
    return Layout(
        architecture=_architecture(config.model_type, dialect, layers),
        dialect=dialect,
        layers=layers,
        hidden=hidden,
        head_dim=head_dim,
        vocabulary=rows,
        context=int(config.max_position_embeddings),
        epsilon=epsilon_of_norms(model),
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_factors=factors,
        tied=getattr(head, "weight", None) is embedding,
    )


def _head_dim(config: Any, blocks: list[Any]) -> int:
    """Channels of a head: of all that are there, else of those that were."""
    found = {int(b.self_attn.head_dim) for b in blocks if _weight(b, "self_attn.q_proj") is not None}
    if len(found) > 1:
        raise CheckpointError(
            f"cannot export to GGUF: head_dim must be one number in all layers, found {sorted(found)}"
        )
    if found:
        return found.pop()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _weight(block: Any, name: str) -> tuple[int, ...] | None:
    """Shape of a projection in a decoder layer; None where the sublayer is gone, weights and all."""
    sublayer, _, projection = name.partition(".")
    whole = getattr(block, sublayer, None)
    if whole is None or not [*whole.parameters(), *whole.buffers(), *whole.children()]:
        return None
    module = getattr(whole, projection, None)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise CheckpointError(
            f"cannot export to GGUF: {name} of a layer is a {type(module).__name__} without a weight of its "
            "own, as quantised modules are. Export the model before it is quantised"
        )
    return tuple(weight.shape)


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
    if not differing:
        raise CheckpointError(
            f"cannot export this {model_type} model to GGUF: its layers have no "
            f"{'MLP' if layers[0].heads else 'attention'}, which llama.cpp's {dialect.name} cannot do without"
        )
    raise CheckpointError(
        f"cannot export this {model_type} model to GGUF: its layers differ in {', '.join(differing)}, and "
        f"llama.cpp's {dialect.name} has one number for all layers. Only llama, mistral and qwen2 models may "
        "differ from layer to layer (its deci architecture). Prune with one width per kind in all layers"
    )


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
