"""Tiny random decoders of many architectures, made from transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from plain import PLAIN
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama_mha": ("llama", SMALL),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3": ("gemma3_text", WIDE),
    "phi": ("phi", GROUPED),
    "phi3": ("phi3", GROUPED),
    "glm": ("glm", WIDE),
    "glm4": ("glm4", WIDE),
    "gpt2": ("gpt2", {**GPT, **SPECIAL}),
    "gpt_neo": (
        "gpt_neo",
        {
            **{k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_attention_heads")},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gptj": ("gptj", {**GPT, **SPECIAL, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", SMALL),
    "opt": (
        "opt",
        {
            **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    "falcon_old": ("falcon", {**SMALL, "multi_query": True, "new_decoder_architecture": False}),
    "falcon_new": ("falcon", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mpt": (
        "mpt",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **SPECIAL},
    ),
    "stablelm": ("stablelm", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "starcoder2": ("starcoder2", GROUPED),
    "granite": ("granite", GROUPED),
    "gpt_bigcode": ("gpt_bigcode", {**GPT, **SPECIAL, "n_inner": 48}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**WIDE, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 1, "topk_group": 1}),
    "deepseek_v3_groups": ("deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1}),
}

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ROUTED = {**WIDE, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT_V2 = {**LATENT, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
GATED_DELTA = {f"linear_{part}": size for part, size in (("num_key_heads", 2), ("num_value_heads", 4))}
GATED_DELTA.update({"linear_key_head_dim": 8, "linear_value_head_dim": 8})

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, GROUPED) for name in ("smollm3", "olmo", "olmo3", "nemotron", "cohere", "cohere2")},
    **{name: (name, GROUPED) for name in ("exaone4", "arcee", "bitnet", "nanochat")},
    **{name: (name, WIDE) for name in ("ernie4_5", "hunyuan_v1_dense", "seed_oss", "helium", "vaultgemma")},
    "persimmon": ("persimmon", SMALL),
    "biogpt": ("biogpt", SMALL),
    "codegen": ("codegen", {**GPT, **SPECIAL, "rotary_dim": 4}),
    "ctrl": ("ctrl", {**GPT, "dff": 48}),
    "mamba": (
        "mamba",
        {**SMALL, "state_size": 4},
    ),
    "lfm2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "gpt_oss": ("gpt_oss", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "llama4_text",
        {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    ),
    "deepseek_v2": ("deepseek_v2", LATENT_V2),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax": ("minimax", {**WIDE, **LINEAR, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 12}),
    "qwen3_next": (
        "qwen3_next",
        {**ROUTED, **LINEAR, **GATED_DELTA, "num_experts": 4, "shared_expert_intermediate_size": 12},
    ),
    "glm4_moe": (
        "glm4_moe",
        {**ROUTED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {**ROUTED, "moe_num_experts": 4, "moe_k": 2}),
}
"""On the page as well, and cut by the tests marked slow; a few of them always (``SAMPLE``)."""
SAMPLE = ("gpt_oss", "llama4", "deepseek_v2")


def tiny(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model with weights large enough that every head and neuron matters.

    Names of :data:`CONFIGURATIONS` build transformers' models, those of ``plain.PLAIN`` plain modules.
    """
    torch.manual_seed(0)
    model = PLAIN[name]() if name in PLAIN else _from_configuration(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.data = noise * 0.2 if parameter.dim() > 1 else 1 + 0.1 * noise
    return model.to(dtype).eval()


def _from_configuration(name: str) -> nn.Module:
    model_type, settings = {**CONFIGURATIONS, **MORE}[name]
    config = AutoConfig.for_model(model_type, **settings)
    # Grouped kernels for experts take no float64.
    options = {"experts_implementation": "eager"} if "num_experts_per_tok" in settings else {}
    return AutoModelForCausalLM.from_config(config, **options)


NAMES = (*CONFIGURATIONS, *MORE, *PLAIN)
