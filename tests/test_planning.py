"""From scores to plans: ratios, targets, multiples, and clear refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.importance import ImportanceScores
from pruner_lib.pruning.planning import plan_pruning

ALL_KINDS = ("attention_head", "query_head", "mlp_neuron", "hidden_channel")


def dependencies_of(**changes):
    values = {
        "vocab_size": 30, "hidden_size": 18, "intermediate_size": 22, "num_hidden_layers": 4,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        return discover(LlamaForCausalLM(LlamaConfig(**{**values, **changes})))


def scores_for(dependencies, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImportanceScores.from_dict(
        {f.name: torch.rand(f.size, generator=generator, dtype=torch.float64) for f in dependencies.families}
    )


DEPENDENCIES = dependencies_of()
SCORES = scores_for(DEPENDENCIES)


def group_size(name):
    family = DEPENDENCIES.family(name)
    total = 0
    for piece in family.slices:
        shape = DEPENDENCIES.shapes[piece.parameter]
        total += torch.Size(shape).numel() // shape[piece.dim] * piece.index.shape[1]
    return total


def test_the_lowest_scores_go():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.25, layers=range(1, 3))
    kinds = ("attention_head", "mlp_neuron")
    assert list(plan.removal) == [f"layers.{layer}.{kind}" for layer in (1, 2) for kind in kinds]
    for name, groups in plan.removal.items():
        assert set(groups) == set(SCORES[name].argsort()[: len(groups)].tolist())


@pytest.mark.parametrize(
    ("ratio", "heads", "neurons"),
    # 3 heads and 22 neurons: halves round upwards, one always stays
    [(0, 0, 0), (0.1, 0, 2), (0.16, 0, 4), (1 / 6, 1, 4), (0.25, 1, 6), (0.5, 2, 11), (0.999, 2, 21)],
)
def test_how_many_go(ratio, heads, neurons):
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=ratio, layers=[0])
    removed = {name: len(groups) for name, groups in plan.removal.items()}
    expected = {"layers.0.attention_head": heads, "layers.0.mlp_neuron": neurons}
    assert removed == {name: count for name, count in expected.items() if count}


def test_ties_go_to_the_lower_index():
    flat = {"layers.0.mlp_neuron": torch.ones(22)}
    plan = plan_pruning(DEPENDENCIES, flat, ratio=0.1, kinds="mlp_neuron", layers=[0])
    assert plan.removal["layers.0.mlp_neuron"] == (0, 1)


def test_query_heads_go_equally_from_every_kv_head():
    scores = {"layers.0.query_head": torch.tensor([5.0, 1, 2, 0.1, 0.2, 0.3, 9, 8, 7])}
    plan = plan_pruning(DEPENDENCIES, scores, ratio=1 / 3, kinds="query_head", layers=[0])
    assert plan.removal["layers.0.query_head"] == (1, 3, 8)


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(0, 0.99),
    kinds=st.sets(st.sampled_from(ALL_KINDS), min_size=1).map(tuple),
    seed=st.integers(0, 9),
)
def test_any_ratio_leaves_a_valid_plan(ratio, kinds, seed):
    plan = plan_pruning(DEPENDENCIES, scores_for(DEPENDENCIES, seed), ratio=ratio, kinds=kinds)
    for name, groups in plan.removal.items():
        family = DEPENDENCIES.family(name)
        assert family.kind in kinds and 0 < len(groups) < family.size
        step = 3 if family.kind == "query_head" else 1
        assert abs(len(groups) - ratio * family.size) <= step / 2 + 1e-6 or len(groups) == family.size - step
    assert plan.params_after <= plan.params_before


@settings(max_examples=30, deadline=None)
@given(
    share=st.floats(0.7, 1),
    kinds=st.sampled_from([("attention_head", "mlp_neuron"), "mlp_neuron", ALL_KINDS]),
)
def test_a_target_is_met_to_within_one_group(share, kinds):
    plan = plan_pruning(DEPENDENCIES, SCORES, target_params=share, kinds=kinds)
    target = int(share * plan.params_before)
    assert target - group_size("layers.0.mlp_neuron") < plan.params_after <= target


def test_a_target_above_one_is_a_count():
    by_count = plan_pruning(DEPENDENCIES, SCORES, target_params=10_000)
    by_share = plan_pruning(DEPENDENCIES, SCORES, target_params=10_000 / by_count.params_before + 1e-9)
    assert dict(by_count.removal) == dict(by_share.removal)
    assert 10_000 - group_size("layers.0.mlp_neuron") < by_count.params_after <= 10_000


def test_heads_alone_meet_a_target_to_within_one_head():
    plan = plan_pruning(DEPENDENCIES, SCORES, target_params=0.85, kinds="attention_head")
    target = int(0.85 * plan.params_before)
    assert target - group_size("layers.0.attention_head") < plan.params_after <= target


def test_a_target_spreads_over_the_layers():
    plan = plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, kinds="mlp_neuron")
    removed = [len(groups) for groups in plan.removal.values()]
    assert len(removed) == 4 and max(removed) - min(removed) <= 1


def test_round_to_leaves_multiples():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.3, kinds="mlp_neuron", round_to=8)
    assert {plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)} == {16}
    mixed = plan_pruning(DEPENDENCIES, SCORES, ratio=0.3, round_to={"mlp_neuron": 4})
    assert {mixed.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)} == {16}
    assert {mixed.kept_sizes[f"layers.{i}.attention_head"] for i in range(4)} == {2}
    untouched = plan_pruning(DEPENDENCIES, SCORES, ratio=0, kinds="mlp_neuron", round_to=8)
    assert not untouched.removal


def test_round_to_holds_under_a_target():
    plan = plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, kinds="mlp_neuron", round_to=4)
    sizes = [plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)]
    assert all(size % 4 == 0 or size == 22 for size in sizes)
    target = int(0.8 * plan.params_before)
    assert target - 4 * group_size("layers.0.mlp_neuron") < plan.params_after <= target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio, target_params, target_macs and target_bytes; got none"),
        ({"ratio": 0.2, "target_params": 0.8}, "got both"),
        ({"ratio": 1.0}, r"ratio 1.0 is outside \[0, 1\)"),
        ({"ratio": -0.1}, r"outside \[0, 1\)"),
        ({"ratio": float("nan")}, r"outside \[0, 1\)"),
        ({"ratio": 0.2, "scope": "everywhere"}, "unknown scope 'everywhere'; valid is 'local'"),
        ({"ratio": 0.2, "layers": [2, 4]}, "layers 2 to 4 asked for; the model has 4 layers, counted"),
        ({"ratio": 0.2, "layers": [-1]}, "counted from 0 to 3"),
        ({"ratio": 0.2, "layers": []}, "layers none asked for"),
        ({"ratio": 0.2, "kinds": "neurons"}, "unknown kind 'neurons' in kinds; valid are attention_head"),
        ({"ratio": 0.2, "kinds": ()}, "no kinds given"),
        ({"ratio": 0.2, "kinds": "expert"}, "kind 'expert': this model has none"),
        ({"ratio": 0.2, "kinds": "vocabulary"}, "'vocabulary': it cannot be cut here: the tokenizer"),
        ({"ratio": 0.2, "kinds": "hidden_channel", "layers": [1]}, "span layers need layers=None"),
        ({"ratio": 0.2, "round_to": 8}, r"cannot be met by layers\.0\.attention_head: it has 3 groups"),
        ({"ratio": 0.2, "round_to": 0}, "round_to must be a whole number of at least 1, not 0"),
        ({"ratio": 0.2, "round_to": {"mlp_neuron": 8.0}}, "a whole number of at least 1, not 8.0"),
        ({"ratio": "0.2"}, "ratio '0.2' is outside"),
        ({"target_macs": "2e9"}, "target_macs '2e9' is no budget"),
        ({"ratio": 0.2, "layers": "4-26"}, r"layers are numbers of layers.*not '4-26'"),
        ({"ratio": 0.2, "protect": [1.0]}, r"protect are numbers of layers.*not \[1.0\]"),
        ({"ratio": 0.2, "round_to": {"neurons": 8}}, "unknown kind 'neurons' in round_to"),
        ({"ratio": {"expert": 0.5}}, "ratio names expert, but the kinds to prune are attention_head"),
        ({"ratio": {"query_head": 0.5}, "kinds": "mlp_neuron"}, "ratio names query_head"),
        ({"target_params": 0}, "target_params 0 is no budget"),
        ({"target_params": 10**9}, "above the dense model's"),
        ({"target_params": 0.01}, "out of reach: with one group left in each of the 8 selected families"),
    ],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        plan_pruning(DEPENDENCIES, SCORES, **options)


def test_one_layer_by_its_number():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.5, layers=2)
    assert plan.removal == plan_pruning(DEPENDENCIES, SCORES, ratio=0.5, layers=[2]).removal


def test_other_objects_are_named():
    with pytest.raises(TypeError, match=r"wants what discover\(model\) found, not a dict"):
        plan_pruning({}, SCORES, ratio=0.2)
    with pytest.raises(TypeError, match=r"wants scores .* not a NoneType"):
        plan_pruning(DEPENDENCIES, None, ratio=0.2)


def test_scores_must_fit():
    with pytest.raises(ValueError, match=r"no scores for family 'layers\.0\.attention_head'"):
        plan_pruning(DEPENDENCIES, {}, ratio=0.2)
    with pytest.raises(ValueError, match=r"has 22 groups, its scores have shape \[5\]"):
        plan_pruning(DEPENDENCIES, {"layers.0.mlp_neuron": torch.ones(5)}, ratio=0.2, kinds="mlp_neuron")
    broken = {"layers.0.mlp_neuron": torch.full((22,), float("nan"))}
    with pytest.raises(ValueError, match="NaN or infinity"):
        plan_pruning(DEPENDENCIES, broken, ratio=0.2, kinds="mlp_neuron")


def test_as_many_experts_stay_as_the_router_chooses():
    from zoo import tiny

    dependencies = discover(tiny("mixtral", torch.float32).to("meta"))
    families = dependencies.select(kind="expert")
    assert [(family.size, family.at_least) for family in families] == [(4, 2)] * len(families)
    scores = {family.name: torch.arange(4.0) for family in families}
    plan = plan_pruning(dependencies, scores, ratio=0.9, kinds="expert")
    assert {groups for groups in plan.removal.values()} == {(0, 1)}


def test_limits_hold_for_layers_too():
    units = {f"layers.{i}": torch.tensor([float(i)]) for i in range(4)}
    for minimum in (3, {"block": 3}):
        assert plan_pruning(DEPENDENCIES, units, ratio=0.5, kinds="block", minimum=minimum).dropped == (
            "layers.0",
        )
    by_two = {"ratio": 0.3, "kinds": "block", "round_to": {"block": 2}}
    assert plan_pruning(DEPENDENCIES, units, **by_two).dropped == ("layers.0", "layers.1")
    assert len(plan_pruning(DEPENDENCIES, units, ratio=0.5, kinds="block", round_to=8).dropped) == 2
    with pytest.raises(ValueError, match=r"minimum 5 cannot be met by 'block': there are 4 such units"):
        plan_pruning(DEPENDENCIES, units, ratio=0.5, kinds="block", minimum={"block": 5})


@pytest.mark.parametrize(("ratio", "kept"), [(0.01, 22), (0.1, 22), (0.2, 16), (0.5, 8), (0.9, 8)])
def test_the_nearest_size_may_be_the_whole_family(ratio, kept):
    """22 neurons, of which 22, 16 or 8 may stay."""
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=ratio, kinds="mlp_neuron", round_to=8)
    assert {plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)} == {kept}
