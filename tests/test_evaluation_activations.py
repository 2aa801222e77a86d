"""Activations counted without weights are what a real forward pass saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.evaluation import EvaluationError, count_activations

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def tiny(device="cpu", **changes):
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**{**SIZES, **changes}, attn_implementation="eager")
        return LlamaForCausalLM(config)


class Chain(nn.Module):
    """One product, one sigmoid: what is saved can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 10, bias=False)

    def forward(self, input_ids):
        return self.second(torch.sigmoid(self.first(self.embed(input_ids))))


def test_by_hand():
    """Saved for 2 × 3 tokens: the ids, the embedded tokens (6 wide), the sigmoid's output (5 wide)."""
    assert count_activations(Chain(), batch_size=2, seq_len=3) == 6 * 8 + 6 * 6 * 4 + 6 * 5 * 4


def test_frozen_weights_have_less_saved_for_them():
    """The product's input is saved for the gradient of its weight alone."""
    model = Chain()
    model.second.weight.requires_grad_(False)
    model.embed.weight.requires_grad_(False)
    # The first product still needs its input, the sigmoid its output.
    assert count_activations(model, batch_size=2, seq_len=3) == 6 * 6 * 4 + 6 * 5 * 4
    model.first.weight.requires_grad_(False)
    assert count_activations(model, batch_size=2, seq_len=3) == 0


def test_a_configuration_says_the_same_as_the_model():
    assert count_activations(tiny("meta"), seq_len=8) == count_activations(tiny(), seq_len=8) > 0


def test_a_real_pass_saves_as_many_bytes():
    """Counted on the CPU by the addresses of what autograd saves; every tensor is held, so none repeats."""
    model, ids = tiny(), torch.zeros((2, 8), dtype=torch.long)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.zeros((2, 1, 8, 8))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert count_activations(model, batch_size=2, seq_len=8) == pytest.approx(real, rel=0.02)


def test_batch_length_and_layers_scale_it():
    base = count_activations(tiny(), seq_len=8)
    assert count_activations(tiny(), batch_size=3, seq_len=8) == pytest.approx(3 * base, rel=0.05)
    assert count_activations(tiny(), seq_len=16) > 2 * base  # attention's square grows faster
    more = count_activations(tiny(num_hidden_layers=6), seq_len=8)
    assert 1.6 * base < more < 2 * base


def test_checkpointing_keeps_the_inputs_of_the_layers_only():
    model = tiny().eval()
    whole = count_activations(model, seq_len=16)
    model.activation_checkpointing_enable()
    assert count_activations(model, seq_len=16) < 0.4 * whole
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seq_len": 33}, "32"),
        ({"seq_len": 0}, "seq_len"),
    ],
)
def test_impossible_sizes_are_refused(options, words):
    with pytest.raises(EvaluationError, match=words):
        count_activations(tiny(), **options)


def test_a_model_that_reads_its_data_is_refused():
    class Reads(Chain):
        def forward(self, input_ids):
            return super().forward(input_ids) * int(input_ids.sum())

    with pytest.raises(EvaluationError, match="Reads could not be run on the meta device"):
        count_activations(Reads())
