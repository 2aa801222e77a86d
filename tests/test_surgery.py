"""Cut equals zeroed, and the cut model is an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.pruning import PruningError, PruningPlan, prune
from pruner_lib.pruning.slicing import meta_copy

GQA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, int]] = {
    "llama": GQA,
    "qwen3": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, "head_dim": 8},
    "phi3": GQA,
    "gpt2": GPT2,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "gpt_neox": {**GQA},
}


def tiny(kind: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float64 model whose every weight matters."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{**ARCHITECTURES[kind], **changes},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.dim() == 1:
                parameter.add_(1.0)
    return model


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def random_removal(
    dependencies: DependencyMap, kind: str, layers: tuple[int, ...], seed: int = 0
) -> dict[str, list[int]]:
    """Half of the groups of each family, at random; of query heads one in each KV group."""
    generator = np.random.default_rng(seed)
    removal = {}
    for family in dependencies.select(kind=kind, layers=layers):
        if family.partition is None:
            groups = generator.choice(family.size, family.size // 2, replace=False)
        else:
            parts = [np.flatnonzero(family.partition == part) for part in np.unique(family.partition)]
            groups = np.array([generator.choice(part) for part in parts])
        removal[family.name] = sorted(int(group) for group in groups)
    return removal


def cut(model: PreTrainedModel, removal: dict[str, list[int]]) -> PreTrainedModel:
    return prune(model, PruningPlan.from_removal(discover(model), removal))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


CASES = [
    (name, kind, layers)
    for name in ARCHITECTURES
    for kind in ("mlp_neuron", "attention_head", "query_head")
    for layers in (((0, 1, 2), (0, 2)) if name in ("llama", "gpt2") else ((0, 2),))
    if kind != "query_head" or name in ("llama", "qwen3", "gemma2", "phi3")
]


@pytest.mark.parametrize(("name", "kind", "layers"), CASES)
def test_cut_equals_zeroed(name: str, kind: str, layers: tuple[int, ...]) -> None:
    model = tiny(name)
    dependencies = discover(model)
    removal = random_removal(dependencies, kind, layers)
    pruned = prune(model, PruningPlan.from_removal(dependencies, removal))
    expected = logits(dependencies.zero(model, removal))
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-9)
    assert (expected - logits(model)).abs().max() > 1e-3, "the removed groups did not matter"


@pytest.mark.parametrize("seed", range(4))
def test_heads_and_neurons_together_with_different_numbers_in_each_layer(seed: int) -> None:
    model = tiny(num_attention_heads=8, num_key_value_heads=4)
    dependencies = discover(model)
    generator = np.random.default_rng(seed)
    removal = {
        family.name: sorted(generator.permutation(family.size)[: generator.integers(0, family.size)].tolist())
        for family in dependencies.select(kind=("attention_head", "mlp_neuron"))
    }
    pruned = prune(model, PruningPlan.from_removal(dependencies, removal))
    torch.testing.assert_close(logits(pruned), logits(dependencies.zero(model, removal)), rtol=0, atol=1e-9)


def test_hidden_channels_keep_the_softmax_scale_and_the_head_size() -> None:
    model = tiny()
    dependencies = discover(model)
    removal = {"hidden_channel": [0, 5, 6, 30]}
    pruned = prune(model, PruningPlan.from_removal(dependencies, removal))
    torch.testing.assert_close(logits(pruned), logits(dependencies.zero(model, removal)), rtol=0, atol=1e-9)
    assert (pruned.config.hidden_size, pruned.config.head_dim) == (28, 8)
    assert pruned.model.layers[0].self_attn.scaling == model.model.layers[0].self_attn.scaling


def test_the_given_model_is_untouched() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    state = torch.get_rng_state()
    pruned = cut(model, {"layers.0.mlp_neuron": [1], "layers.1.attention_head": [0]})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config and model.model.layers[1].self_attn.q_proj.out_features == 32
    assert torch.equal(torch.get_rng_state(), state)
    storages = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not storages & {tensor.data_ptr() for tensor in pruned.state_dict().values()}
    assert pruned.training


def test_sizes_in_modules_and_configuration_follow() -> None:
    model = tiny(num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    removal = {f"layers.{i}.attention_head": [i] for i in range(3)}
    removal |= {f"layers.{i}.mlp_neuron": [0, 1, 2, i + 3] for i in range(3)}
    pruned = cut(model, removal)
    config = pruned.config
    sizes = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
    )
    assert sizes == (4, 2, 8, 44)
    attention = pruned.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.o_proj.in_features, attention.k_proj.out_features) == (
        32,
        32,
        16,
    )
    assert attention.num_key_value_groups == 2
    assert not config.is_heterogeneous


def test_query_heads_change_the_number_per_kv_head() -> None:
    pruned = cut(tiny(), {f"layers.{i}.query_head": [0, 3] for i in range(3)})
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 2)
    assert pruned.model.layers[0].self_attn.num_key_value_groups == 1


def test_layers_of_different_width_are_in_per_layer_config() -> None:
    pruned = cut(tiny(), {"layers.1.attention_head": [0], "layers.2.mlp_neuron": list(range(8))})
    layers = pruned.config.per_layer_config
    assert [layer.num_key_value_heads for layer in layers] == [2, 1, 2]
    assert [layer.num_attention_heads for layer in layers] == [4, 2, 4]
    assert [layer.intermediate_size for layer in layers] == [48, 48, 40]
    assert pruned.model.layers[1].self_attn.config.num_key_value_heads == 1


def test_tied_weights_stay_tied_and_flags_stay() -> None:
    model = tiny(tie_word_embeddings=True).to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    pruned = cut(model, {"hidden_channel": [3, 4], "layers.0.mlp_neuron": [0]})
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert tuple(pruned.lm_head.weight.shape) == (64, 30) and pruned.lm_head.in_features == 30
    assert not pruned.model.norm.weight.requires_grad and pruned.lm_head.weight.requires_grad
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


def test_meta_models_are_cut_without_weights() -> None:
    model = meta_copy(tiny())
    pruned = cut(model, {f"layers.{i}.mlp_neuron": [0, 1] for i in range(3)})
    assert all(parameter.is_meta for parameter in pruned.parameters())
    assert pruned.config.intermediate_size == 46


def test_a_cut_model_can_be_cut_again() -> None:
    model = tiny(num_attention_heads=8, num_key_value_heads=4)
    once = cut(model, {"layers.1.attention_head": [2], "layers.0.mlp_neuron": [0, 1]})
    dependencies = discover(once)
    removal = {"layers.1.attention_head": [0], "layers.2.attention_head": [3], "layers.0.mlp_neuron": [5]}
    twice = prune(once, PruningPlan.from_removal(dependencies, removal))
    torch.testing.assert_close(logits(twice), logits(dependencies.zero(once, removal)), rtol=0, atol=1e-9)
    assert [layer.num_key_value_heads for layer in twice.config.per_layer_config] == [4, 2, 3]


def generated(model: PreTrainedModel, **options: object) -> torch.Tensor:
    return model.generate(tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, **options)


UNEVEN = {"layers.0.attention_head": [1], "layers.1.mlp_neuron": [0, 2, 4], "layers.2.mlp_neuron": [7]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    pruned = cut(tiny(name), UNEVEN)
    expected = generated(pruned, use_cache=False)
    assert torch.equal(generated(pruned, use_cache=True), expected)
    assert torch.equal(generated(pruned, cache_implementation="static", disable_compile=True), expected)


def test_attention_can_be_switched_in_every_layer() -> None:
    pruned = cut(tiny(), UNEVEN)
    expected = logits(pruned)
    pruned.set_attn_implementation("eager")
    chosen = {layer.self_attn.config._attn_implementation for layer in pruned.model.layers}
    assert chosen == {"eager"}
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-5)  # eager: softmax in float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_reach_every_parameter(name: str) -> None:
    pruned = cut(tiny(name), UNEVEN)
    pruned(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_adapters_attach_and_merge() -> None:
    from peft import LoraConfig, get_peft_model

    pruned = cut(tiny(), UNEVEN)
    expected = logits(pruned)
    adapted = get_peft_model(pruned, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-12)
    adapted(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=0, atol=1e-9)


def test_an_empty_plan_copies() -> None:
    model = tiny()
    copied = cut(model, {})
    assert torch.equal(logits(copied), logits(model)) and copied.lm_head.weight is not model.lm_head.weight


def test_a_plan_for_another_model_is_refused() -> None:
    plan = PruningPlan.from_removal(discover(tiny()), {"layers.0.mlp_neuron": [0]})
    with pytest.raises(PruningError, match="another model"):
        prune(tiny(intermediate_size=40), plan)
    with pytest.raises(PruningError, match=r"another model: it knows no model\.layers\.3\."):
        prune(tiny(num_hidden_layers=4), plan)
    stale = tiny()
    stale.set_attn_implementation("eager")  # scales after the product, where "sdpa" scales before it
    with pytest.raises(PruningError, match=r"no longer is what discover saw, even uncut: .* Call discover"):
        prune(stale, plan)
    with pytest.raises(TypeError, match=r"wants a PruningPlan .* not a dict"):
        prune(tiny(), dict(plan.removal))


def test_a_cut_that_nothing_confirms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pruner_lib.pruning import surgery

    refuse: Callable[..., str] = lambda model, plan: "layers.0.mlp_neuron is not there"  # noqa: E731
    monkeypatch.setattr(surgery, "find_difference", refuse)
    with pytest.raises(PruningError, match=r"cannot cut mlp_neuron.*is not there"):
        cut(tiny(), {"layers.0.mlp_neuron": [0]})


def test_a_size_that_means_two_things_is_told_from_the_softmax_scale():
    """8 query heads on 4 KV heads of 4 channels: 3 KV heads, not 3 channels."""
    model = tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    removal = {f.name: [1] for f in discover(model).select(kind="attention_head")}
    cut = prune(model, PruningPlan.from_removal(discover(model), removal))
    config = cut.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 4)


class OneMatrix(nn.Module):
    """Values and a gated MLP out of one fused matrix, back through another: up, heads, gate."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.neurons = 4, 8, 64
        self.fused = nn.Linear(32, 2 * self.neurons + self.heads * self.size, bias=False)
        self.out = nn.Linear(self.neurons + self.heads * self.size, 32, bias=False)
        self.share = nn.Parameter(torch.ones(self.heads))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        sizes = [self.neurons, self.heads * self.size, self.neurons]
        up, values, gate = self.fused(hidden).split(sizes, dim=-1)
        heads = values.unflatten(-1, (self.heads, self.size)) * self.share[:, None]
        return hidden + self.out(torch.cat([heads.flatten(2), torch.sigmoid(gate) * up], dim=-1))


class OneMatrixModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16, bias=False)
        self.layers = nn.ModuleList(OneMatrix() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def test_two_families_that_shrink_alike_inside_one_dimension() -> None:
    """64 neurons do not divide the 160 rows they share with the heads, and both keep three quarters."""
    torch.manual_seed(0)
    model = OneMatrixModel()
    found = discover(model)
    both = [f for f in found.select(layers=range(2)) if f.size in (4, 64)]
    assert len(both) == 4
    plan = PruningPlan.from_removal(found, {f.name: range(f.size // 4) for f in both})
    small = prune(model, plan)
    for layer in small.layers:
        assert (layer.heads, layer.neurons, layer.fused.out_features) == (3, 48, 120)
    ids = torch.arange(12).view(1, 12)
    assert torch.allclose(small(ids), found.zero(model, plan.removal)(ids), atol=1e-6)
