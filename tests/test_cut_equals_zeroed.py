"""The oracle: cutting any subset of groups gives the logits of the full model with them zeroed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import BY_CONFIGURATION, IN_MEMORY, REFUSED, can_lose, opens, read_page, rows
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model
from torch import nn
from zoo import MORE, NAMES, PLAIN, SAMPLE, tiny

from pruner_lib.checkpoint import CheckpointError, load_pruned, save_pruned
from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.pruning import PruningPlan, prune

IN_FLOAT32 = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v3_groups"),
    *("llama4", "glm4_moe", "ernie4_5_moe", "phimoe"),
)
TOLERANCE = dict.fromkeys(IN_FLOAT32, 1e-5)  # routers, and complex numbers, that compute in float32
TOKENS = torch.arange(3, 15).reshape(2, 6)
KINDS = (
    *("mlp_neuron", "attention_head", "query_head", "hidden_channel"),
    *("qk_channel", "value_channel", "latent_channel", "expert"),
)
ROWS = {(name, row[0]): row[3] for name, found in read_page().items() for row in found if row[3] != "no"}
EXHAUSTIVE = set(MORE) - set(SAMPLE)
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[0] in EXHAUSTIVE else [])
    for case, how in ROWS.items()
    if how in (BY_CONFIGURATION, IN_MEMORY)
]
# Of every architecture one kind, in turn another, is trained, saved, generated from; the rest are slow.
NAMED = [name for name in NAMES if name not in EXHAUSTIVE]
TURNS = {
    (name, kinds[number % len(kinds)])
    for number, name in enumerate(NAMED)
    for kinds in [[kind for (of, kind), how in ROWS.items() if of == name and how != REFUSED]]
}
IN_TURN = [
    pytest.param(*case, marks=[] if case in TURNS else [pytest.mark.slow])
    for case, how in ROWS.items()
    if how != REFUSED
]


def random_groups(family: GroupFamily, random: np.random.Generator, most: float = 1.0) -> list[int]:
    """Any groups but all, and as many of every part."""
    whole = np.zeros(family.size, dtype=np.int64) if family.partition is None else family.partition
    parts = [np.flatnonzero(whole == part) for part in np.unique(whole)]
    spare = len(parts[0]) - max(1, -(-family.at_least // len(parts)))
    count = int(random.integers(1, max(1, int(spare * most)) + 1)) if spare > 0 else 0
    return sorted(int(g) for part in parts for g in random.choice(part, count, replace=False))


def random_removal(
    dependencies: DependencyMap, kind: str, random: np.random.Generator, even: bool = False
) -> dict[str, list[int]]:
    """Groups of every family of a kind; ``even``: as many of each family of one size."""
    removal: dict[str, list[int]] = {}
    counts: dict[int, list[int]] = {}
    for family in dependencies.select(kind=kind):
        groups = random_groups(family, random, most=0.5)
        if even:
            groups = counts.setdefault(family.size, groups)
        if groups:
            removal[family.name] = groups
    return removal


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_discovery_finds(name):
    """And it prints on a screen of 100 columns; linear attention takes more lines, each with its reason."""
    found = discover(tiny(name))
    committed = [(kind, groups, layers, why or None) for kind, groups, layers, _, why in read_page()[name]]
    assert committed == list(rows(found)), "run python tests/architectures.py and commit the page"
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= (34 if name == "qwen3_next" else 24)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cut_equals_zeroed(name, kind):
    model = tiny(name)
    dependencies = discover(model)
    random = np.random.default_rng(len(name))
    families = [f for f in dependencies.select(kind=kind) if can_lose(f)]
    removal = {f.name: random_groups(f, random) for f in families}
    plan = PruningPlan.from_removal(dependencies, removal)
    cut, zeroed = prune(model, plan), dependencies.zero(model, removal)
    difference = (logits(cut) - logits(zeroed)).abs().max().item()
    assert difference < TOLERANCE.get(name, 1e-9), f"max difference {difference:.2e} after removing {removal}"
    assert (logits(cut) - logits(model)).abs().max() > 1e-6, "the groups removed did not matter"
    assert sum(p.numel() for p in cut.parameters()) == plan.params_after


@pytest.mark.parametrize(("name", "kind"), IN_TURN)
def test_the_cut_model_is_an_ordinary_one(name, kind, tmp_path):
    model = tiny(name)
    dependencies = discover(model)
    removal = random_removal(dependencies, kind, np.random.default_rng(1), even=True)
    cut = prune(model, PruningPlan.from_removal(dependencies, removal))
    assert trained(cut) == trained(model)
    how = ROWS[name, kind]
    if name in PLAIN or how == IN_MEMORY:
        assert_weights_reload(name, model, cut, removal, tmp_path / "weights.safetensors")
    if name in PLAIN:
        return
    assert_generates_alike(cut)
    if how == IN_MEMORY:
        with pytest.raises(CheckpointError, match="no way to say"):
            save_pruned(cut, tmp_path / "cut")
        return
    assert how == BY_CONFIGURATION
    save_pruned(cut, tmp_path / "cut")
    again = load_pruned(tmp_path / "cut")
    if again._can_set_experts_implementation():
        again.set_experts_implementation("eager")  # grouped kernels take no float64
    # Gemma rounds the scale of its embeddings to the dtype it is built in, hence no torch.equal.
    torch.testing.assert_close(logits(again), logits(cut), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [case for case, how in ROWS.items() if how == REFUSED])
def test_what_the_page_calls_refused_is_refused(name, kind):
    model = tiny(name)
    assert opens(model, discover(model), kind) == REFUSED


def trained(model: nn.Module) -> set[str]:
    """Parameters that a backward pass reaches; what only chooses experts is reached in no model."""
    copied = copy.deepcopy(model)
    out = copied(input_ids=TOKENS)
    (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
    return {n for n, p in copied.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}


def assert_weights_reload(
    name: str, model: nn.Module, cut: nn.Module, removal: dict[str, list[int]], file: Path
) -> None:
    """A file of weights, and the same cut of a model with other weights to take them up, are enough."""
    save_model(cut, file)
    other = tiny(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    again = prune(other, PruningPlan.from_removal(discover(other), removal))
    assert not torch.equal(logits(again), logits(cut))
    assert load_weights(again, file) == (set(), [])
    assert torch.equal(logits(again), logits(cut))


def assert_generates_alike(cut: nn.Module) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = cut.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, cut.generate(TOKENS, use_cache=False, **options))
    assert cached.shape == (2, 11)
