"""What a plan leaves is an ordinary model: it trains, compiles, moves, copies and is pruned again."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_surgery import cut, logits, tiny, tokens

from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, plan_pruning, prune

UNEVEN = {"layers.0.attention_head": [1], "layers.1.mlp_neuron": [0, 2, 4], "layers.2.mlp_neuron": [7]}


def pruned_in_every_way():
    """Heads, neurons, channels and a layer gone, every layer of another width."""
    model = tiny("llama")
    removal = {**UNEVEN, "hidden_channel": [3, 8]}
    return prune(model, PruningPlan.from_removal(discover(model), removal, dropped=["layers.1"]))


def test_it_trains():
    model = pruned_in_every_way().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_activation_checkpointing_gives_the_same_gradients():
    plain = pruned_in_every_way().train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def distance_to_compiled(backend):
    """Largest difference of logits, as a share of the largest logit."""
    model = pruned_in_every_way().float().eval()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        found, expected = compiled(tokens()).logits, model(tokens()).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_it_compiles(backend):
    assert distance_to_compiled(backend) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_it():
    """In a process of its own: setuptools, which it imports, refuses to follow an import of distutils."""
    code = "from test_plan_ordinary import distance_to_compiled; print(distance_to_compiled('inductor'))"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-4


def test_it_moves_between_dtypes_and_devices():
    model = pruned_in_every_way()
    expected = logits(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        logits(half).double(), expected, rtol=0.1, atol=0.2 * float(expected.abs().max())
    )
    again = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    again.load_state_dict(model.state_dict())
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_it_is_cut_and_runs_on_a_gpu():
    model = tiny("llama").cuda()
    found = cut(model, UNEVEN)
    assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
    with torch.no_grad():
        on_gpu = found(tokens().cuda()).logits.cpu()
    torch.testing.assert_close(on_gpu, logits(cut(tiny("llama"), UNEVEN)), rtol=0, atol=1e-6)


def test_copies_are_independent_and_equal():
    model = pruned_in_every_way()
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    torch.nn.init.zeros_(other.lm_head.weight)
    assert logits(model).abs().max() > 0


def test_pruned_again_and_again():
    """Three rounds of a quarter each; every round is exact against zeroing."""
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    for seed in range(3):
        dependencies = discover(model)
        generator = torch.Generator().manual_seed(seed)
        scores = {f.name: torch.rand(f.size, generator=generator) for f in dependencies.families}
        kinds = ("attention_head", "mlp_neuron", "hidden_channel")
        plan = plan_pruning(dependencies, scores, ratio=0.25, kinds=kinds)
        smaller = prune(model, plan)
        torch.testing.assert_close(
            logits(smaller), logits(dependencies.zero(model, plan.removal)), rtol=0, atol=1e-9
        )
        model = smaller
    assert model.get_input_embeddings().embedding_dim < 20
