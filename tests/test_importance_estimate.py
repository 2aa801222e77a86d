"""Estimated scores against brute force from stored full gradients, in float64 on tiny models."""

import itertools

import numpy as np
import pytest
import torch
from importance_oracle import (
    LAYOUTS,
    VOCABULARY,
    assert_unchanged,
    brute_force,
    first_order,
    odd_state,
    snapshot,
    stored,
    tiny_gpt2,
    tiny_llama,
    tokens_of,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.discovery.families import CoupledSlice, GroupFamily, UnknownFamilyError
from pruner_lib.importance import CRITERIA, REDUCTIONS, Criterion, estimate_importance
from pruner_lib.importance.estimate import slice_scores

NAMES = [name for name in CRITERIA if name != "random"]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def layout(request):
    model = LAYOUTS[request.param]()
    tokens = tokens_of(5, 9)
    return model, discover(model), tokens, stored(model, tokens)


@pytest.fixture(scope="module")
def llama():
    model = tiny_llama()
    return model, discover(model)


@pytest.fixture(scope="module")
def gpt2():
    model = tiny_gpt2()
    return model, discover(model)


@pytest.mark.parametrize(("criterion", "reduction"), list(itertools.product(NAMES, REDUCTIONS)))
def test_agrees_with_brute_force(layout, criterion, reduction):
    model, dependencies, tokens, known = layout
    batches = tokens if CRITERIA[criterion].needs_batches else None
    scores = estimate_importance(model, dependencies, batches, criterion=criterion, reduction=reduction)
    assert len(scores) == sum(family.cuttable for family in dependencies.families) > 3
    for name in scores:
        expected = brute_force(dependencies.family(name), known, criterion, reduction)
        torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["l1", "taylor_first", "wanda"])
def test_vectors_can_be_left_out(criterion):
    model = tiny_gpt2()
    dependencies, tokens = discover(model), tokens_of(3, 6)
    name = dependencies.select("mlp_neuron")[0].name
    known = stored(model, tokens)
    options = {"criterion": criterion, "families": [name]}
    without = estimate_importance(model, dependencies, tokens, include_vectors=False, **options)[name]
    family = dependencies.family(name)
    expected = brute_force(family, known, criterion, "sum", vectors=False)
    torch.testing.assert_close(without, expected, rtol=1e-9, atol=0)
    assert (estimate_importance(model, dependencies, tokens, **options)[name] > without).all()


def test_heads_fold_over_their_own_channels():
    """Two KV heads of two query heads with one channel each, by hand.

    Query rows score 1, 2, 4, 8. KV head 0 owns query rows 0 and 1, not 0 and 2.
    """
    by_index = {
        "q": {0: torch.tensor([1.0, 2.0, 4.0, 8.0])},
        "k": {0: torch.tensor([10.0, 20.0])},
        "o": {1: torch.tensor([100.0, 200.0, 400.0, 800.0])},
    }
    queries, keys = np.array([[0, 1], [2, 3]]), np.array([[0], [1]])
    slices = (CoupledSlice("q", 0, queries), CoupledSlice("k", 0, keys), CoupledSlice("o", 1, queries))
    family = GroupFamily("heads", "attention_head", 0, 2, slices)
    assert slice_scores(family, by_index).tolist() == [[3, 12], [10, 20], [300, 1200]]


def test_grouped_query_weights_fold_to_hand_computed_heads(llama):
    """All q rows of query head i hold i; with 6 query heads on 3 KV heads, l1 shows the owner."""
    model, dependencies = llama
    attention = model.model.layers[0].self_attn
    saved = {name: p.detach().clone() for name, p in attention.named_parameters()}
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.q_proj.weight.copy_(torch.arange(6.0).repeat_interleave(4)[:, None].expand(24, 18))
    scores = estimate_importance(model, dependencies, None, criterion="l1")["layers.0.attention_head"]
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(saved[name])
    # 4 rows of 18 weights per query head: (0 + 1) · 72, (2 + 3) · 72, (4 + 5) · 72
    assert scores.tolist() == [72, 360, 648]


@pytest.mark.parametrize("size", [1, 2, 3, None])
@pytest.mark.parametrize("criterion", ["taylor_first", "taylor_vector", "taylor_second", "taylor_mixed"])
def test_micro_batches_change_nothing(gpt2, criterion, size):
    model, dependencies = gpt2  # float64 throughout
    tokens = tokens_of(5, 7)
    whole = estimate_importance(model, dependencies, tokens, criterion=criterion)
    parts = estimate_importance(model, dependencies, tokens, criterion=criterion, micro_batch_size=size)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=0)


def test_bfloat16_accumulates_in_float32(llama):
    _, dependencies = llama
    model = tiny_llama().to(torch.bfloat16)
    exact = estimate_importance(model.double(), dependencies, None, criterion="l2")
    half = estimate_importance(model.to(torch.bfloat16), dependencies, None, criterion="l2")
    for name in exact:
        torch.testing.assert_close(half[name], exact[name], rtol=1e-6, atol=0)


def test_random_depends_on_seed_and_family_only(llama):
    model, dependencies = llama
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = estimate_importance(model, dependencies, None, criterion="random", seed=3)
    alone = estimate_importance(
        model, dependencies, None, criterion="random", seed=3, families=["layers.1.mlp_neuron"]
    )
    other = estimate_importance(model, dependencies, None, criterion="random", seed=4)
    assert torch.equal(first["layers.1.mlp_neuron"], alone["layers.1.mlp_neuron"])
    assert not torch.equal(first["layers.1.mlp_neuron"], other["layers.1.mlp_neuron"])
    assert not torch.equal(first["layers.0.mlp_neuron"], first["layers.1.mlp_neuron"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_criterion_of_ones_own(llama):
    model, dependencies = llama
    cubic = Criterion("l3", "Σ |W|³", lambda W: W.abs() ** 3)
    scores = estimate_importance(model, dependencies, None, criterion=cubic, families=["layers.0.mlp_neuron"])
    mlp = model.model.layers[0].mlp
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
    expected = sum(weight.detach().abs().pow(3).sum(1) for weight in weights)
    torch.testing.assert_close(scores["layers.0.mlp_neuron"], expected, rtol=1e-9, atol=0)
    assert scores.criterion == "l3"


def test_records_how_it_was_made(llama):
    model, dependencies = llama
    options = {"source": "books", "seed": 7}
    scores = estimate_importance(model, dependencies, tokens_of(3, 6), reduction="max", **options)
    assert (scores.criterion, scores.reduction, scores.source) == ("taylor_second", "max", "books")
    assert (scores.seed, scores.num_samples, scores.seq_len) == (7, 3, 6)
    magnitude = estimate_importance(model, dependencies, tokens_of(3, 6), criterion="l1", **options)
    assert (magnitude.source, magnitude.seed, magnitude.num_samples) == (None, None, 0)


@pytest.mark.parametrize("criterion", ["taylor_first", "taylor_mixed", "l1", "wanda"])
def test_the_model_comes_back_as_it_was(llama, criterion):
    _, dependencies = llama
    model = odd_state(tiny_llama())
    before = snapshot(model)
    with torch.no_grad():  # the caller's mode does not matter either
        estimate_importance(model, dependencies, tokens_of(2, 5), criterion=criterion)
    assert_unchanged(model, before)


def test_the_model_comes_back_after_an_exception(llama):
    _, dependencies = llama
    model = odd_state(tiny_llama())

    def fail(module, inputs):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        first_order(model, dependencies, tokens_of(2, 5))
    assert_unchanged(model, before)
    handle.remove()


def test_a_frozen_model_scores_the_same(llama):
    model, dependencies = llama
    tokens = tokens_of(2, 6)
    trained = first_order(model, dependencies, tokens)
    frozen = tiny_llama().requires_grad_(False)
    for name, values in first_order(frozen, dependencies, tokens).scores.items():
        assert torch.equal(values, trained[name])


def test_nan_names_sequence_and_module():
    model, tokens = tiny_llama(tie_word_embeddings=False), tokens_of(4, 6)
    dependencies = discover(model)
    tokens[tokens == 7] = 8
    tokens[2, 3] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    before = snapshot(model)["hooks"]
    with pytest.raises(FloatingPointError, match=r"sequence 2 is nan.*model\.embed_tokens\. No scores"):
        first_order(model, dependencies, tokens, micro_batch_size=2)
    assert snapshot(model)["hooks"] == before


def test_infinity_deep_inside_is_found(llama):
    _, dependencies = llama
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj\."):
        first_order(model, dependencies, tokens_of(2, 5))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "load_calibration"),
        (torch.zeros(2, 5), "LongTensor"),
        (torch.zeros(5, dtype=torch.long), "LongTensor"),
        (torch.zeros(2, 1, dtype=torch.long), "at least 1 sequence of 2 tokens"),
        (torch.zeros(0, 4, dtype=torch.long), "at least 1 sequence of 2 tokens"),
        (torch.full((2, 5), VOCABULARY), "token id 40, outside the model's vocabulary of 40"),
        (torch.full((2, 5), -100), "token id -100"),
    ],
)  # fmt: skip
def test_unusable_batches(llama, batches, message):
    model, dependencies = llama
    with pytest.raises(ValueError, match=message):
        first_order(model, dependencies, batches)


def test_unknown_names_list_the_valid_ones(llama):
    model, dependencies = llama
    with pytest.raises(ValueError, match=r"unknown criterion 'taylor'; valid are random, l1, .*taylor_mixed"):
        estimate_importance(model, dependencies, None, criterion="taylor")
    with pytest.raises(ValueError, match=r"unknown reduction 'min'; valid are sum, product, max, last, mean"):
        estimate_importance(model, dependencies, None, criterion="l1", reduction="min")
    with pytest.raises(UnknownFamilyError, match=r"layers\.0\.mlp_neuron"):
        estimate_importance(model, dependencies, None, criterion="l1", families=["layers.0.mlp"])
    with pytest.raises(ValueError, match=r"no family to score: families is empty.*dependencies\.select"):
        first_order(model, dependencies, tokens_of(2, 5), families=[])
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        first_order(model, dependencies, tokens_of(2, 5), micro_batch_size=0)


def test_dependencies_of_another_model(llama):
    _, dependencies = llama
    other = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=18, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=6, num_key_value_heads=3, head_dim=4,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="does not belong to this model"):
        estimate_importance(other, dependencies, None, criterion="l1")
    with torch.device("meta"):
        empty = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        estimate_importance(empty, dependencies, None, criterion="l1")


def test_zero_gradients_are_an_error(llama):
    _, dependencies = llama
    model = tiny_llama()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="every gradient is zero"):
        first_order(model, dependencies, tokens_of(2, 5))


def test_products_that_vanish_are_refused():
    """129 slices of small numbers have a product below the smallest float64: all groups would tie at 0."""
    slices = torch.full((129, 3), 1e-3, dtype=torch.float64)
    assert (REDUCTIONS["product"](slices[:100]) > 0).all()
    with pytest.raises(ValueError, match=r"product of 129 slices is below .* for 3 of 3 groups.*\"mean\""):
        REDUCTIONS["product"](slices)
    assert REDUCTIONS["product"](torch.tensor([[0.0, 2.0], [3.0, 4.0]])).tolist() == [0, 8]


@pytest.mark.parametrize("ids", [torch.uint8, torch.uint16, torch.int32])
def test_ids_of_any_whole_kind(llama, ids):
    model, dependencies = llama
    expected = estimate_importance(model, dependencies, tokens_of(2, 5), criterion="wanda")
    found = estimate_importance(model, dependencies, tokens_of(2, 5).to(ids), criterion="wanda")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [1.5, "2", True])
def test_a_micro_batch_is_a_whole_number(llama, size):
    with pytest.raises(ValueError, match="micro_batch_size must be a whole number, not"):
        estimate_importance(*llama, tokens_of(2, 5), micro_batch_size=size)


def test_a_mask_is_no_text(llama):
    with pytest.raises(ValueError, match=r"got torch\.bool"):
        estimate_importance(*llama, tokens_of(2, 5) > 3)
