"""Gradients of embedding and head row by row, against autograd's, and what they hold."""

import pytest
import torch
from importance_oracle import assert_unchanged, first_order, odd_state, snapshot, tiny_llama, tokens_of
from torch import nn
from torch.nn import functional
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.importance import benchmark
from pruner_lib.importance.ends import EndGradients


class Ends(nn.Module):
    """A tied matrix that is looked up, multiplied with a bias, and used in a way of its own."""

    def __init__(self, padding=None, own=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(11, 4, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(11, generator=generator, dtype=torch.float64))
        self.padding, self.own = padding, own

    def forward(self, tokens):
        hidden = functional.embedding(tokens, self.weight, self.padding)
        hidden.mul_(3)  # in place, as scaled embeddings may be
        logits = functional.linear(hidden.tanh(), self.weight, bias=self.bias)
        return logits + hidden @ self.weight.T if self.own else logits


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("own", [False, True])
def test_rows_are_those_of_autograd(padding, own):
    model, tokens = Ends(padding, own), torch.tensor([[1, 3, 3, 10], [0, 10, 5, 1]])
    model(tokens).square().sum().backward()
    expected, bias = model.weight.grad.clone(), model.bias.grad.clone()
    model.zero_grad()
    ends = EndGradients({"weight": model.weight})
    with ends:
        loss = model(tokens).square().sum()
    loss.backward()
    if model.weight.grad is not None:
        ends.add("weight", model.weight.grad)
    assert (model.weight.grad is not None) == own
    found = ends.found["weight"]
    assert found.any()
    for rows in (slice(0, 11), slice(2, 5), slice(8, 20)):
        torch.testing.assert_close(found[rows], expected[rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.bias.grad, bias, rtol=1e-12, atol=0)


def test_a_head_alone_gets_its_gradient():
    """Nothing before it is wanted, so its input needs no gradient."""
    head = nn.Linear(4, 7, bias=False)
    inputs = torch.randn(5, 4)
    ends = EndGradients({"head": head.weight})
    with ends:
        loss = head(inputs).square().sum()
    loss.backward()
    assert head.weight.grad is None
    expected = 2 * functional.linear(inputs, head.weight).T.detach() @ inputs
    torch.testing.assert_close(ends.found["head"][0:7], expected, rtol=1e-5, atol=1e-5)


def test_embeddings_that_rescale_their_rows_are_left_to_autograd():
    table = nn.Embedding(6, 3, scale_grad_by_freq=True)
    ends = EndGradients({"table": table.weight})
    with ends:
        table(torch.tensor([1, 1, 2])).sum().backward()
    assert not ends.found and table.weight.grad is not None


@pytest.mark.parametrize("name", ["llama", "gemma", "opt", "phi"])
def test_one_pass_and_whole_gradients_agree(name):
    """Scaled and tied embeddings, positions that are looked up, heads with a bias, a norm between."""
    model = tiny(name)
    dependencies, tokens = discover(model), tokens_of(4, 7) + 3
    one = first_order(model, dependencies, tokens)
    whole = first_order(model, dependencies, tokens, accumulate="gradients", micro_batch_size=4)
    for family in one:
        torch.testing.assert_close(one[family], whole[family], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_no_gradient_as_large_as_the_vocabulary_is_held(tied, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("pruner_lib.importance.scoring._CHUNK", 1 << 14)  # small against this small model
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    dependencies, tokens = discover(model), tokens_of(1, 3)
    cases = benchmark.cases(model, dependencies, tokens)
    wanted = ("forward + backward", "taylor_first, all families")
    extra = benchmark.extra_memory(model, tokens, {name: cases[name] for name in wanted})
    assert extra["forward + backward"] > 0.9  # the two ends are nearly all of this model
    assert extra["taylor_first, all families"] < 0.15


def test_the_model_comes_back_as_it_was():
    model = odd_state(tiny_llama())
    dependencies, before = discover(model), snapshot(model)
    first_order(model, dependencies, tokens_of(2, 5))

    def fail(gradient):
        raise KeyboardInterrupt

    def watch(module, args, output):
        output.register_hook(fail)

    handle = model.model.norm.register_forward_hook(watch)
    hooked = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        first_order(model, dependencies, tokens_of(2, 5))
    assert_unchanged(model, hooked)
    handle.remove()
    assert_unchanged(model, before)
