"""Ablation in stacked suffixes against the naive loop, whole layers, and grades."""

import copy

import pytest
import torch
from importance_oracle import EVERY, assert_unchanged, odd_state, snapshot, tiny_llama, tokens_of
from torch.nn import functional
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.importance import (
    ImportanceScores,
    grade,
    loss_changes,
    measure_importance,
    score_layers,
)
from pruner_lib.importance.calibration import mean_loss
from pruner_lib.importance.grading import overlap_of_lowest


def naive(model, dependencies, tokens, family, groups):
    """One copy, one forward pass per group."""
    dense = mean_loss(model, [tokens])
    return torch.tensor(
        [mean_loss(dependencies.zero(model, {family: [g]}), [tokens]) - dense for g in groups],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", EVERY)
def test_stacked_suffixes_are_the_naive_loop_on_every_architecture(name):
    model = tiny(name)
    dependencies, tokens = discover(model), tokens_of(3, 6) + 3
    family = dependencies.select("mlp_neuron", layers=1)[0]
    groups = [0, 5, family.size - 1]
    found = loss_changes(model, dependencies, tokens, family, groups, micro_batch_size=2)
    expected = naive(model, dependencies, tokens, family.name, groups)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # norms compute in float32


@pytest.mark.parametrize("family", ["layers.0.attention_head", "layers.1.query_head", "layers.1.mlp_neuron"])
def test_only_the_layer_and_what_follows_is_computed(family):
    model = tiny_llama(num_hidden_layers=3)
    dependencies, tokens = discover(model), tokens_of(2, 5)
    calls = {n: 0 for n in range(3)}

    def count(n):
        def hook(module, args):
            calls[n] += len(args[0])

        return hook

    handles = [layer.mlp.register_forward_pre_hook(count(n)) for n, layer in enumerate(model.model.layers)]
    measure_importance(model, dependencies, tokens, family)
    for handle in handles:
        handle.remove()
    found, size = dependencies.family(family), dependencies.family(family).size
    for n in range(3):  # two sequences once for all, and two for every group from the family's layer on
        assert calls[n] == 2 + (2 * size if n >= found.layer else 0)


def test_a_family_across_layers_takes_whole_passes():
    model = tiny_llama()
    dependencies, tokens = discover(model), tokens_of(2, 5)
    found = loss_changes(model, dependencies, tokens, "hidden_channel", [3, 1])
    expected = naive(model, dependencies, tokens, "hidden_channel", [3, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_weights_come_back_after_an_exception(call):
    model = odd_state(tiny_llama())
    dependencies, calls = discover(model), []

    def fail(module, args):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        measure_importance(model, dependencies, tokens_of(2, 5), "layers.0.mlp_neuron")
    assert_unchanged(model, before)
    handle.remove()


def test_measuring_says_what_is_wrong():
    model = tiny_llama()
    dependencies = discover(model)
    with pytest.raises(ValueError, match=r"groups of layers\.0\.mlp_neuron run from 0 to 11; got \[12\]"):
        loss_changes(model, dependencies, tokens_of(2, 5), "layers.0.mlp_neuron", [12])
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        measure_importance(model, dependencies, tokens_of(2, 5), "layers.0.mlp_neuron", micro_batch_size=0)
    for width in (8, 16):  # smaller would find its indices in this model too
        other = discover(tiny_llama(intermediate_size=width))
        with pytest.raises(
            ValueError, match=rf"is \[{width}, 18\] in the dependencies, the model holds \[12, 18\]"
        ):
            measure_importance(model, other, tokens_of(2, 5), "layers.0.mlp_neuron")


def test_records_what_was_measured():
    model = tiny_llama()
    options = {"source": "books", "seed": 4}
    truth = measure_importance(model, discover(model), tokens_of(2, 5), "layers.1.attention_head", **options)
    assert (truth.criterion, truth.source, truth.seed) == ("loss_change", "books", 4)
    assert (truth.num_samples, truth.seq_len, list(truth)) == (2, 5, ["layers.1.attention_head"])


def hidden_states(model, tokens):
    found = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


def together(scores):
    return torch.cat([scores[unit] for unit in scores])


@pytest.mark.parametrize("size", [None, 2])
def test_block_influence_is_one_minus_the_cosine(size):
    model, tokens = tiny_llama(num_hidden_layers=3), tokens_of(3, 7)
    expected = [
        float((1 - functional.cosine_similarity(before, after, dim=-1)).mean())
        for before, after in hidden_states(model, tokens)
    ]
    scores = score_layers(model, discover(model), tokens, micro_batch_size=size, source="books", seed=3)
    assert list(scores) == [f"layers.{layer}" for layer in range(3)]
    assert (scores.criterion, scores.source, scores.seed) == ("layer_influence", "books", 3)
    torch.testing.assert_close(together(scores), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_a_layer_that_does_nothing_has_no_influence():
    model, tokens = tiny_llama(num_hidden_layers=3), tokens_of(3, 7)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    for measure in ("influence", "loss"):
        values = together(score_layers(model, discover(model), tokens, measure=measure))
        assert values[1].abs() < 1e-12 and values[[0, 2]].abs().min() > 1e-6


def test_loss_change_of_a_layer_is_that_of_the_model_without_it():
    model, tokens = tiny_llama(num_hidden_layers=3), tokens_of(3, 7)
    model.eval()
    dense, expected = mean_loss(model, [tokens]), []
    for layer in range(3):
        shorter = copy.deepcopy(model)
        del shorter.model.layers[layer]
        shorter.config.num_hidden_layers = 2
        expected.append(mean_loss(shorter, [tokens]) - dense)
    before = snapshot(model)
    found = score_layers(model, discover(model), tokens, measure="loss", micro_batch_size=2)
    torch.testing.assert_close(
        together(found), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert_unchanged(model, before)


def test_score_layers_says_what_is_wrong():
    model = tiny_llama()
    with pytest.raises(ValueError, match="unknown measure 'cosine'; valid are influence, loss"):
        score_layers(model, discover(model), tokens_of(2, 5), measure="cosine")
    with pytest.raises(ValueError, match="LongTensor"):
        score_layers(model, discover(model), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        score_layers(model, discover(model), tokens_of(2, 5), micro_batch_size=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    before = snapshot(model)["hooks"]
    for measure in ("influence", "loss"):
        with pytest.raises(FloatingPointError, match=r"sequence 0 is nan.*model\.layers\.1\.mlp\.up_proj\."):
            score_layers(model, discover(model), tokens_of(2, 5), measure=measure)
    assert snapshot(model)["hooks"] == before


def scores_of(**families):
    return ImportanceScores.from_dict({name: torch.tensor(values) for name, values in families.items()})


def test_grade_by_hand():
    truth = scores_of(a=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], b=[1.0, 2.0, 3.0, 4.0])
    estimate = scores_of(a=[1.0, 5.0, 0.0, 3.0, 4.0, 6.0, 7.0, 8.0], b=[1.0, 3.0, 2.0, 4.0])
    found = grade(estimate, truth)
    # lowest two of a: 0, 1 against 2, 0; lowest one of b: 0 against 0
    assert dict(found.overlap) == {"a": 0.5, "b": 1.0} and found.lowest == 0.75
    # ranks of a differ by 1, 4, -2, 0, 0, 0, 0, 0 … : 1 - 6·Σd²/(n(n²-1)); b: 1 - 6·2/60
    ranks = [1, 4, 0, 2, 3, 5, 6, 7]
    expected = 1 - 6 * sum((rank - place) ** 2 for place, rank in enumerate(ranks)) / (8 * 63)
    assert found.rank_correlation["a"] == pytest.approx(expected)
    assert found.rank_correlation["b"] == pytest.approx(0.8)
    assert found.spearman == pytest.approx((expected + 0.8) / 2)
    assert "overlap of the lowest 25 % 75 %, over 2 families" in repr(found)


def test_grade_on_a_sample_of_groups():
    truth, estimate = scores_of(a=[3.0, 1.0]), scores_of(a=[0.0, 9.0, 5.0, 1.0])
    found = grade(estimate, truth, groups={"a": [1, 3]}, ratio=0.5)
    assert found.spearman == 1 and found.lowest == 1
    with pytest.raises(ValueError, match=r"a has 4 scores and 2 measured groups.*groups=\{name: indices\}"):
        grade(estimate, truth)


def test_grade_says_what_is_wrong():
    with pytest.raises(ValueError, match="no family in common"):
        grade(scores_of(a=[1.0]), scores_of(b=[1.0]))
    for ratio in (0, 1, -0.5):
        with pytest.raises(ValueError, match="ratio must lie between 0 and 1"):
            grade(scores_of(a=[1.0]), scores_of(a=[1.0]), ratio=ratio)


def test_overlap_counts_at_least_one_group():
    assert overlap_of_lowest(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), 0.1) == 1
    assert overlap_of_lowest(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 0.0]), 0.1) == 0


@pytest.mark.parametrize("shared", ["module", "weights"])
def test_a_weight_that_two_layers_use_is_zeroed_in_both(shared):
    model = tiny_llama(num_hidden_layers=3)
    one, other = model.model.layers[1], model.model.layers[2]
    if shared == "module":
        other.mlp = one.mlp
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(other.mlp, name).weight = getattr(one.mlp, name).weight
    dependencies, tokens = discover(model), tokens_of(3, 6)
    found = measure_importance(model, dependencies, tokens, "layers.1.mlp_neuron")["layers.1.mlp_neuron"]
    expected = naive(model, dependencies, tokens, "layers.1.mlp_neuron", range(12))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
