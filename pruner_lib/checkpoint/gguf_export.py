"""Write a model as one GGUF file, the format of llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import PreTrainedModel

from pruner_lib.assets.files import whole_file
from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.gguf_layout import LayerWidths, Layout, describe, interleaved
from pruner_lib.checkpoint.gguf_tokenizer import read_vocabulary

_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_SMALLEST_MLP = 32  # neurons, all zero, where llama.cpp needs an MLP and the model has none
_FILE_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
GGUF_DTYPES = tuple(_FILE_TYPES)


def export_gguf(
    model: PreTrainedModel, tokenizer: Any, path: str | os.PathLike[str], *, dtype: str = "f16"
) -> Path:
    """Write model and tokenizer as a GGUF file that llama.cpp runs.

    A model with one width per kind in all layers becomes llama.cpp's architecture of the same name;
    a llama or mistral model whose layers differ becomes ``deci``, which holds head and neuron counts
    per layer. Weights are rounded once, from the dtype they are in: matrices to ``dtype``, norms and
    biases to f32. In a quantised file, matrices whose rows are no multiple of 32 stay f16 and, below
    8 bits, embedding and output head are q8_0, as these suffer most.

    >>> export_gguf(pruned, tokenizer, "pruned.gguf", dtype="q8_0")

    Args:
        model: a causal language model of the type llama, mistral, qwen2, qwen3 or gemma; not changed.
        tokenizer: its fast tokenizer, byte-level BPE or SentencePiece's BPE.
        path: the file, replaced whole or not at all.
        dtype: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.

    Returns:
        The path.

    Warns:
        UserWarning: texts of a kind that llama.cpp splits into other tokens, with the reason.

    Raises:
        CheckpointError: something in the model or tokenizer that GGUF cannot express, a weight that is
            not finite or overflows f16, an unknown dtype, a folder as path. Nothing is written.
        OSError: the disk is full or not writable; what was at ``path`` is still whole.
    """
    if not isinstance(dtype, str) or dtype not in _FILE_TYPES:
        raise CheckpointError(f"unknown GGUF dtype {dtype!r}; give one of {', '.join(_FILE_TYPES)}")
    target = Path(os.fsdecode(path))
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; give the name of the file, such as {target}/model.gguf")
    layout = describe(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError(
            "cannot export a model with weights on the meta device: they were never loaded, or accelerate "
            "keeps them elsewhere (offloading). Load the model whole, onto the CPU for instance"
        )
    vocabulary = read_vocabulary(tokenizer, layout.vocabulary, end=_end_of_text(model))
    tensors = _named_tensors(model, layout)
    with _folder_of(target), whole_file(target) as temporary:
        writer = gguf.GGUFWriter(None, layout.architecture)
        try:
            _add_fields(writer, layout, model, dtype)
            vocabulary.write(writer)
            _write(writer, temporary, tensors, layout, dtype)
        except BaseException:
            _close_quietly(writer)
            raise
    return target


@contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """The folder of a file, made when missing, and gone again when the file did not come about."""
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else put a file there
                folder.rmdir()
        raise


def _end_of_text(model: PreTrainedModel) -> int | None:
    """The token at which the model itself stops, for a tokenizer that has none."""
    for settings in (model.generation_config, model.config):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return int(found[0] if isinstance(found, list | tuple) else found)
    return None


def _add_fields(writer: gguf.GGUFWriter, layout: Layout, model: PreTrainedModel, dtype: str) -> None:
    """Every number that llama.cpp needs; none is left to its defaults."""
    writer.add_type("model")
    name = getattr(model.config, "name_or_path", "") or model.config.model_type
    writer.add_name(Path(str(name)).name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[dtype][1])
    writer.add_vocab_size(layout.vocabulary)
    writer.add_context_length(layout.context)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.layers))
    # Heads pruned: hidden / heads is no longer the head's size, so it is always written.
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(layout.rope_theta)
    writer.add_layer_norm_rms_eps(layout.epsilon)
    heads, kv_heads, neurons = zip(*((w.heads, w.kv_heads, w.neurons) for w in _written(layout)), strict=True)
    varying = layout.architecture == layout.dialect.varying
    writer.add_head_count(list(heads) if varying else heads[0])
    writer.add_head_count_kv(list(kv_heads) if varying else kv_heads[0])
    writer.add_feed_forward_length(list(neurons) if varying else neurons[0])


def _written(layout: Layout) -> tuple[LayerWidths, ...]:
    """Widths as the file has them: where llama.cpp needs a sublayer that is gone, zeros are written.

    Its deci forgets the attention of a layer without an MLP (and stops if that is the last layer), and
    takes the size of all heads for 0 when the first layer has none.
    """
    layers = []
    for index, layer in enumerate(layout.layers):
        heads, kv_heads = (1, 1) if index == 0 and not layer.heads else (layer.heads, layer.kv_heads)
        layers.append(LayerWidths(heads, kv_heads, layer.neurons or _SMALLEST_MLP))
    return tuple(layers)


def _named_tensors(model: PreTrainedModel, layout: Layout) -> dict[str, torch.Tensor]:
    """GGUF name to tensor, in the order of the model.

    Raises:
        CheckpointError: a weight that the architecture has no name for, is missing, or holds no
            floating-point numbers.
    """
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = gguf.get_tensor_name_map(architecture, len(layout.layers))
    found: dict[str, torch.Tensor] = {}
    if layout.rope_factors is not None:
        found["rope_freqs.weight"] = layout.rope_factors
    for source, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        if _belongs_to_missing_sublayer(source, layout):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or (name.endswith(".bias") and not _may_have_bias(name, layout)):
            raise CheckpointError(
                f"cannot export to GGUF: llama.cpp's {layout.architecture} has no place for {source} "
                f"of shape {tuple(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise CheckpointError(
                f"cannot export to GGUF: {source} holds {parameter.dtype}, codes of a quantised model. "
                "Export the model before it is quantised"
            )
        found[name] = parameter.detach()
    for index, (real, written) in enumerate(zip(layout.layers, _written(layout), strict=True)):
        if real.heads != written.heads:
            found |= _zero_attention(index, layout)
        if real.neurons != written.neurons:
            found |= _zero_mlp(index, layout.hidden)
    missing = sorted(_required(layout) - set(found))
    if missing:
        raise CheckpointError(
            f"cannot export to GGUF: the model has no parameter for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; a quantised module keeps it elsewhere. Export the "
            "model before it is quantised"
        )
    return found


def _may_have_bias(name: str, layout: Layout) -> bool:
    """True where llama.cpp adds a bias: in the projections of a layer, and not in every architecture."""
    return layout.dialect.biases and name.split(".")[-2] in (*_ATTENTION[1:], *_MLP[1:])


def _required(layout: Layout) -> set[str]:
    """Names without which llama.cpp cannot run a model of this layout."""
    names = {"token_embd.weight", "output_norm.weight"} | (set() if layout.tied else {"output.weight"})
    for index, widths in enumerate(_written(layout)):
        parts = (*(_ATTENTION if widths.heads else ()), *(_MLP if widths.neurons else ()))
        names |= {f"blk.{index}.{part}.weight" for part in parts}
    return names


def _belongs_to_missing_sublayer(source: str, layout: Layout) -> bool:
    """The norm before a sublayer that is gone: llama.cpp asks for none."""
    parts = source.split(".")
    if "layers" not in parts:
        return False
    layer = layout.layers[int(parts[parts.index("layers") + 1])]
    if parts[-2] == "input_layernorm":
        return not layer.heads
    return parts[-2] == "post_attention_layernorm" and not layer.neurons


def _zero_attention(index: int, layout: Layout) -> dict[str, torch.Tensor]:
    wide, narrow = torch.zeros(layout.head_dim, layout.hidden), torch.zeros(layout.hidden, layout.head_dim)
    parts = {"attn_norm": torch.ones(layout.hidden), "attn_q": wide, "attn_k": wide, "attn_v": wide,
             "attn_output": narrow}  # fmt: skip
    return {f"blk.{index}.{name}.weight": tensor for name, tensor in parts.items()}


def _zero_mlp(index: int, hidden: int) -> dict[str, torch.Tensor]:
    wide, narrow = torch.zeros(_SMALLEST_MLP, hidden), torch.zeros(hidden, _SMALLEST_MLP)
    parts = {"ffn_norm": torch.ones(hidden), "ffn_gate": wide, "ffn_up": wide, "ffn_down": narrow}
    return {f"blk.{index}.{name}.weight": tensor for name, tensor in parts.items()}


def _write(
    writer: gguf.GGUFWriter, path: Path, tensors: Mapping[str, torch.Tensor], layout: Layout, dtype: str
) -> None:
    """Announce all tensors, then write them one by one, so that one at a time is in memory twice."""
    for name, tensor in tensors.items():
        kind = _type_of(name, tensor, dtype)
        stored = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_values(name, tensor, layout, _type_of(name, tensor, dtype)))
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
    writer.close()


def _type_of(name: str, tensor: torch.Tensor, dtype: str) -> GGMLQuantizationType:
    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    if dtype.startswith("q") and tensor.shape[-1] % 32:
        return GGMLQuantizationType.F16
    if dtype.startswith("q") and name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return _FILE_TYPES[dtype][0]


def _values(name: str, tensor: torch.Tensor, layout: Layout, kind: GGMLQuantizationType) -> np.ndarray:
    values = tensor.float().cpu()
    if not torch.isfinite(values).all():
        raise CheckpointError(f"cannot export to GGUF: {name} holds NaN or infinity")
    parts = name.split(".")
    if layout.dialect.interleaved and parts[0] == "blk" and parts[2] in ("attn_q", "attn_k"):
        layer = _written(layout)[int(parts[1])]
        values = interleaved(values, layer.heads if parts[2] == "attn_q" else layer.kv_heads)
    if name.endswith("norm.weight"):
        values = values + layout.dialect.norm_offset
    if kind == GGMLQuantizationType.F16 and values.abs().max() > np.finfo(np.float16).max:
        raise CheckpointError(
            f"cannot export to GGUF in f16: {name} reaches {values.abs().max():.3g}, beyond f16's 65504; "
            "use bf16 or f32"
        )
    return gguf.quantize(values.contiguous().numpy(), kind)


def _close_quietly(writer: gguf.GGUFWriter) -> None:
    try:
        writer.close()
    except OSError:  # a full disk again, when the rest of the buffer is written
        writer.fout = None


def gguf_fields(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Key and value of every field of a GGUF file, its token lists included."""
    for key, found in gguf.GGUFReader(Path(path)).fields.items():
        yield key, found.contents()
