"""Exported to GGUF, a model says the same in llama.cpp; what GGUF cannot say is refused in words."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_tokenizers import byte_level
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pruner_lib.checkpoint import CheckpointError, LlamaCpp, export_gguf, gguf_export, measure_gguf
from pruner_lib.checkpoint.gguf_layout import describe, interleaved
from pruner_lib.discovery import discover
from pruner_lib.evaluation import perplexity
from pruner_lib.pruning import PruningPlan, prune

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
UNIFORM = {f"layers.{i}.{kind}": groups for i in range(3)
           for kind, groups in (("query_head", [0, 3]), ("mlp_neuron", list(range(32))))}  # fmt: skip
UNEVEN = {
    "layers.0.attention_head": [1], "layers.1.mlp_neuron": list(range(33)), "layers.2.query_head": [0, 2],
}  # fmt: skip
WINDOWS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


def tiny(kind: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model whose every weight matters."""
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 0.0 if kind == "gemma" else 1.0  # Gemma's norms multiply by 1 + weight
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else centre + 0.1 * noise)
    return model


def pruned(removal: dict[str, list[int]], kind: str = "llama", **changes: object) -> PreTrainedModel:
    model = tiny(kind, **changes)
    return prune(model, PruningPlan.from_removal(discover(model), removal))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


def fields(path: Path) -> dict[str, Any]:
    return dict(gguf_export.gguf_fields(path))


EXACT: dict[str, tuple[str, dict[str, list[int]], str, dict[str, object]]] = {
    "llama": ("llama", {}, "llama", {}),
    "llama, one width": ("llama", UNIFORM, "llama", {}),
    "llama, layers differ": ("deci", UNEVEN, "llama", {}),
    "llama, tied": ("deci", UNEVEN, "llama", {"tie_word_embeddings": True}),
    "llama, biases": ("deci", UNEVEN, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 positions": ("deci", UNEVEN, "llama", {"rope_parameters": LLAMA3}),
    "llama, residual channels": ("llama", {"hidden_channel": [0, 1, 7]}, "llama", {}),
    "mistral": ("llama", UNIFORM, "mistral", {"sliding_window": None}),
    "qwen2, layers differ": ("deci", UNEVEN, "qwen2", {}),
    "qwen3": ("qwen3", UNIFORM, "qwen3", {}),
    "gemma": ("gemma", UNIFORM, "gemma", {}),
}


@pytest.mark.parametrize("case", EXACT)
def test_llama_cpp_computes_the_same(case: str, tokenizer: Any, tmp_path: Path) -> None:
    architecture, removal, kind, changes = EXACT[case]
    model = pruned(removal, kind, **changes)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")
    assert fields(path)["general.architecture"] == architecture
    # Gemma's GELU is looked up in a half-precision table there.
    tolerance = 3e-4 if case == "gemma" else 2e-6
    expected = float(perplexity(model, None, WINDOWS, seq_len=12))
    ids = WINDOWS[0, :5]
    answer = model.generate(ids[None], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with LlamaCpp(path) as runner:
        assert runner.perplexity(WINDOWS) == pytest.approx(expected, rel=tolerance)
        assert runner.greedy(ids.tolist(), 4) == answer[0, 5:].tolist()


class NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **others: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


@pytest.mark.parametrize(("attentions", "mlps"), [((1,), ()), ((0,), (2,)), ((), (1,)), ((2,), (2,))])
def test_sublayers_that_are_gone(
    attentions: tuple[int, ...], mlps: tuple[int, ...], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny()
    for index in attentions:
        model.model.layers[index].self_attn = NoAttention()
    for index in mlps:
        model.model.layers[index].mlp = NoMlp()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")
    expected = float(perplexity(model, None, WINDOWS, seq_len=12))
    assert LlamaCpp(path).perplexity(WINDOWS) == pytest.approx(expected, rel=2e-6)


# Rounding to b bits moves the logits by about 2^-b of themselves; measured: q8_0 0.6 %, q4_0 8 %.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "largest"),
    [("f16", 1e-3, 0.52), ("bf16", 1e-2, 0.52), ("q8_0", 2e-2, 0.30), ("q4_0", 0.2, 0.25)],
)
def test_rounding_costs_what_it_should(
    dtype: str, tolerance: float, largest: float, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny()
    whole = export_gguf(model, tokenizer, tmp_path / "whole.gguf", dtype="f32")
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    weights = [sum(t.n_bytes for t in gguf.GGUFReader(p).tensors) for p in (path, whole)]
    assert weights[0] / weights[1] < largest
    expected = float(perplexity(model, None, WINDOWS, seq_len=12))
    assert LlamaCpp(path).perplexity(WINDOWS) == pytest.approx(expected, rel=tolerance)


def test_size_and_perplexity_of_several_types(tokenizer: Any) -> None:
    model = tiny()
    half, eight = measure_gguf(model, tokenizer, WINDOWS, dtypes=("f16", "q8_0"))
    assert (half.dtype, eight.dtype) == ("f16", "q8_0") and half.bytes > eight.bytes
    assert half.num_tokens == 22 and "q8_0" in str(eight)
    expected = float(perplexity(model, None, WINDOWS, seq_len=12))
    assert half.perplexity == pytest.approx(expected, rel=1e-3) != eight.perplexity


def test_matrices_whose_rows_are_no_multiple_of_32_stay_f16(tokenizer: Any, tmp_path: Path) -> None:
    model = pruned({f"layers.{i}.mlp_neuron": [0] for i in range(3)})
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    assert np.isfinite(LlamaCpp(path).perplexity(WINDOWS))


def test_every_number_is_written(tokenizer: Any, tmp_path: Path) -> None:
    found = fields(export_gguf(pruned(UNEVEN), tokenizer, tmp_path / "model.gguf"))
    assert found["deci.attention.head_count"] == [2, 4, 2]
    assert found["deci.attention.head_count_kv"] == [1, 2, 2]
    assert found["deci.feed_forward_length"] == [96, 63, 96]
    assert found["deci.attention.key_length"] == found["deci.attention.value_length"] == 16
    assert found["deci.rope.dimension_count"] == 16
    assert found["deci.context_length"] == 128 and found["deci.block_count"] == 3
    uniform = fields(export_gguf(pruned(UNIFORM), tokenizer, tmp_path / "model.gguf"))
    assert uniform["llama.attention.head_count"] == 2 and uniform["llama.attention.head_count_kv"] == 2
    assert uniform["llama.feed_forward_length"] == 64 and uniform["llama.attention.key_length"] == 16


def test_rows_of_a_head_in_the_other_order() -> None:
    rows = torch.arange(8)[:, None] * torch.ones(1, 3)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny("gpt2", n_embd=32, n_layer=1, n_head=2), "gpt2 model.*known are llama"),
        (lambda: pruned(UNEVEN, "qwen3"), r"differ in query heads \(2, 4\), KV heads.* neurons \(63, 96\)"),
        (lambda: tiny("mistral", sliding_window=16), "sliding window of 16 tokens"),
        (lambda: tiny(hidden_act="relu"), "activation 'relu'"),
        (
            lambda: tiny(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
                                          "original_max_position_embeddings": 64}),
            "positions of type 'yarn'",
        ),
        (lambda: pruned({"hidden_channel": [0, 1]}, "gemma"), "embedding scale of 8.0 with 62 residual"),
        (lambda: tiny().to("meta"), "meta device"),
        (lambda: tiny("qwen3", rope_parameters=LLAMA3), "frequencies of type 'llama3'.*base alone"),
        (lambda: tiny("qwen3", attention_bias=True), r"qwen3 has no place for .*q_proj\.bias"),
        (lambda: tiny("gemma", attention_bias=True), r"gemma has no place for .*q_proj\.bias"),
        (lambda: tiny("gemma", use_bidirectional_attention=True), "attention in both directions"),
        (lambda: tiny(is_causal=False), "attention in both directions"),
        (lambda: tiny(rope_parameters=None).model, "LlamaModel to GGUF: it has no output head"),
        (lambda: without_mlps(tiny("qwen3")), "its layers have no MLP, which llama.cpp's qwen3 cannot"),
    ],
    ids=["architecture", "layers", "window", "activation", "positions", "embedding", "meta", "frequencies",
         "qwen3 biases", "gemma biases", "both directions", "not causal", "no head", "no MLP"],
)  # fmt: skip
def test_what_gguf_cannot_say_is_refused(model: Any, words: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        export_gguf(model(), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def without_mlps(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp = NoMlp()
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": LLAMA3}], ids=["default", "llama3"])
def test_a_cast_model_has_no_frequencies_of_its_own(kind: str, changes: dict[str, Any]) -> None:
    """Casting rounds the table of frequencies, too; a checkpoint never holds it."""
    if changes and kind != "llama":
        return
    expected = describe(tiny(kind, **changes)).rope_factors
    for dtype in (torch.bfloat16, torch.float16):
        found = describe(tiny(kind, **changes).to(dtype)).rope_factors
        assert found is expected is None or torch.equal(found, expected)


def test_frequencies_without_a_table_are_the_configuration_s() -> None:
    with torch.device("meta"):
        empty = tiny(rope_parameters=LLAMA3)
    assert torch.equal(describe(empty).rope_factors, describe(tiny(rope_parameters=LLAMA3)).rope_factors)


def change(model: PreTrainedModel, what: str) -> PreTrainedModel:
    layer = model.model.layers[1]
    match what:
        case "epsilon":
            layer.input_layernorm.variance_epsilon = 0.5
        case "activation":
            layer.mlp.act_fn = nn.Tanh()
        case "head bias":
            model.lm_head = nn.Linear(64, 300, bias=True)
        case "quantised head":
            model.lm_head = Packed(model.lm_head)
        case "quantised attention":
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
        case "quantised up":
            layer.mlp.up_proj = Packed(layer.mlp.up_proj)
        case "codes":
            codes = torch.ones(96, 64, dtype=torch.int8)
            layer.mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
    return model


class Packed(nn.Module):
    """A linear layer that keeps its weight as quantised modules do: under no name that one could know."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("epsilon", r"the norms add 1e-06, 0\.5 to the variance"),
        ("activation", "another function in a layer's act_fn than 'silu'"),
        ("head bias", r"no place for lm_head\.bias"),
        ("quantised head", r"no parameter for output\.weight; a quantised module"),
        ("quantised attention", r"self_attn\.q_proj of a layer is a Packed without a weight"),
        ("quantised up", r"no parameter for blk\.1\.ffn_up\.weight"),
        ("codes", r"up_proj\.weight holds torch\.int8"),
    ],
)
def test_what_was_changed_in_memory_is_seen(what: str, words: str, tokenizer: Any, tmp_path: Path) -> None:
    """Each of these gave a file that says something else, or that llama.cpp cannot open."""
    with pytest.raises(CheckpointError, match=words):
        export_gguf(change(tiny(), what), tokenizer, tmp_path / "new" / "deep" / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_any_attention(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn = NoAttention()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")
    expected = float(perplexity(model, None, WINDOWS, seq_len=12))
    assert LlamaCpp(path).perplexity(WINDOWS) == pytest.approx(expected, rel=2e-6)


def test_a_folder_is_no_file(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; give the name of the file"):
        export_gguf(tiny(), tokenizer, tmp_path)


def test_a_softmax_scale_of_its_own_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[1].self_attn.scaling = 0.5
    with pytest.raises(CheckpointError, match="softmax scale"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")


def test_a_weight_without_a_place_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[1].self_attn.register_parameter("sinks", nn.Parameter(torch.ones(4)))
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.1\.self_attn\.sinks"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")


def test_an_unknown_dtype_names_the_known_ones(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'int4'; give one of f32, f16, bf16, q8_0"):
        export_gguf(tiny(), tokenizer, tmp_path / "model.gguf", dtype="int4")


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (1e6, "beyond f16")])
def test_values_that_cannot_be_stored(value: float, words: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=words):
        export_gguf(model, tokenizer, tmp_path / "new" / "model.gguf")
    assert list(tmp_path.iterdir()) == []


STEPS = ["write_header_to_file", "write_kv_data_to_file", "write_tensor_data", "flush"]


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_leaves_the_old_file(
    step: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_gguf(tiny(), tokenizer, tmp_path / "model.gguf")
    before = path.read_bytes()
    original = getattr(gguf.GGUFWriter, step)
    calls = []

    def full(self: gguf.GGUFWriter, *arguments: Any) -> None:
        calls.append(step)
        if len(calls) > (5 if step == "write_tensor_data" else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, step, full)
        with pytest.raises(OSError, match="No space left"):
            export_gguf(pruned(UNIFORM), tokenizer, path)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["model.gguf"]


def test_the_model_is_not_changed(tokenizer: Any, tmp_path: Path) -> None:
    model = pruned(UNEVEN)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q8_0")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_the_runner_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no GGUF file"):
        LlamaCpp(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(CheckpointError, match="cannot open"):
        LlamaCpp(tmp_path / "text.gguf")


def test_a_file_that_stops_llama_cpp_does_not_stop_this_process(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    model.model.layers[2].self_attn, model.model.layers[2].mlp = NoAttention(), NoMlp()
    monkeypatch.setattr(gguf_export, "_written", lambda layout: layout.layers)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="llama"):
        LlamaCpp(path).greedy([5, 6, 7], 1)
