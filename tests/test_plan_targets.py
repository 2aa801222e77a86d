"""Budgets in any measure, limits, uniform plans: met to within one group, or refused in words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planning import dependencies_of, scores_for
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.pruning import GlobalRanking, PruningPlan, plan_pruning, prune
from pruner_lib.pruning.costs import cost_terms

DEPENDENCIES = dependencies_of()
LAYERS = {
    f"layers.{i}{unit}": torch.tensor([float(3 + i)]) for i in range(4) for unit in ("", ".attention", ".mlp")
}
SCORES = {**scores_for(DEPENDENCIES).scores, **LAYERS}
TERMS = cost_terms(DEPENDENCIES)
MEASURES = {
    "target_params": TERMS.params,
    "target_macs": TERMS.macs(1, 64),
    "target_bytes": TERMS.weight_bytes,
}


def measures_of(dependencies):
    terms = cost_terms(dependencies)
    return dict(zip(MEASURES, (terms.params, terms.macs(1, 64), terms.weight_bytes), strict=True))


def measured(plan, target):
    return MEASURES[target](plan.removal, tuple(plan.dropped_modules.values()))


def one_group(target, kinds):
    """What the cheapest group costs in the dense model; groups get no dearer as others go."""
    dense = MEASURES[target]({})
    families = [f for f in DEPENDENCIES.families if f.kind in kinds and f.cuttable]
    parts = {f.name: 3 if f.kind == "query_head" else 1 for f in families}
    return min(dense - MEASURES[target]({f.name: list(range(parts[f.name]))}) for f in families)


KINDS = [
    ("attention_head", "mlp_neuron"),
    ("mlp_neuron", "query_head"),
    ("mlp_neuron", "attention_head", "query_head", "hidden_channel"),
    ("mlp_neuron", "block"),
    ("attention_head", "mlp_neuron", "hidden_channel", "attention", "mlp", "block"),
]


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.65, 1),
    target=st.sampled_from(list(MEASURES)),
    kinds=st.sampled_from(KINDS),
    scope=st.sampled_from(["local", "global"]),
)
def test_a_target_is_met_to_within_one_group(share, target, kinds, scope):
    plan = plan_pruning(DEPENDENCIES, SCORES, **{target: share}, kinds=kinds, scope=scope)
    wanted = int(share * MEASURES[target]({}))
    assert measured(plan, target) <= wanted
    if "block" in kinds and not any("mlp_neuron" in name for name in plan.removal):
        return  # dropped layers alone meet it, and no single group has gone that could come back
    assert wanted - one_group(target, kinds) < measured(plan, target)


def test_so_is_a_target_where_a_family_has_nothing_to_give():
    """Layer 0 has its minimum of two heads: what it cannot give is not the cheapest group there is."""
    values = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48, "head_dim": 8}
    even = dependencies_of(**values, intermediate_size=24)
    plan = PruningPlan.from_removal(even, {"layers.0.attention_head": [0, 1, 2, 3]})
    dependencies = discover(prune(even._model, plan))
    scores, neuron = scores_for(dependencies), 3 * 48
    checked = 0
    for share in torch.linspace(0.6, 0.99, 40).tolist():
        for weight in (None, 1e-9, 1.0, 1e9):
            options = {"target_params": share, "minimum": {"attention_head": 2, "mlp_neuron": 20}}
            if weight is not None:
                ranking = GlobalRanking(weigh="none", floor=0, kind_weights={"attention_head": weight})
                options |= {"scope": "global", "ranking": ranking}
            try:
                plan = plan_pruning(dependencies, scores, **options)
            except ValueError as error:
                assert "out of reach" in str(error)
                continue
            if any("mlp_neuron" in name for name in plan.removal):
                checked += 1
                assert int(share * plan.params_before) - neuron < plan.params_after, options
    assert checked > 50


@pytest.mark.parametrize("target", MEASURES)
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "expert"), ("bloom", "qk_channel"), ("deepseek_v3", "latent_channel"),
     ("deepseek_v3", "value_channel")],
)  # fmt: skip
def test_so_is_a_target_for_what_is_less_often_cut(name, kind, target, scope):
    dependencies = discover(tiny(name))
    families = dependencies.select(kind=kind)
    cost = measures_of(dependencies)[target]
    least = {f.name: [0] for f in families if f.size > 1}
    wanted = int(cost({}) - 0.4 * (cost({}) - cost(least)) * (families[0].size - 1))
    plan = plan_pruning(dependencies, scores_for(dependencies), **{target: wanted}, kinds=kind, scope=scope)
    found = cost(plan.removal)
    assert {dependencies.family(n).kind for n in plan.removal} == {kind}
    assert wanted - max(cost({}) - cost({n: [0]}) for n in least) < found <= wanted


@pytest.mark.parametrize("target", MEASURES)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_target_above_one_is_a_count(target, scope):
    dense = MEASURES[target]({})
    by_count = plan_pruning(DEPENDENCIES, SCORES, **{target: dense * 0.8}, scope=scope)
    by_share = plan_pruning(DEPENDENCIES, SCORES, **{target: 0.8}, scope=scope)
    assert dict(by_count.removal) == dict(by_share.removal)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("options", [{"ratio": 0.4}, {"target_params": 0.8}, {"target_macs": 0.75}])
def test_a_uniform_plan_has_one_width_per_kind(scope, options):
    kinds = ("attention_head", "query_head", "mlp_neuron")
    plan = plan_pruning(DEPENDENCIES, SCORES, **options, scope=scope, kinds=kinds, uniform=True)
    for kind in kinds:
        assert len({plan.kept_sizes[f.name] for f in DEPENDENCIES.select(kind=kind)}) == 1
    assert plan.params_after < plan.params_before


def test_a_uniform_plan_opens_without_per_layer_configuration():
    from test_surgery import tiny

    model = tiny("llama")
    dependencies = discover(model)
    scores = scores_for(dependencies)
    plan = plan_pruning(
        dependencies, scores, target_params=0.8, kinds=("mlp_neuron", "query_head"), uniform=True
    )
    pruned = prune(model, plan)
    assert not pruned.config.is_heterogeneous
    assert pruned.config.intermediate_size == plan.kept_sizes["layers.0.mlp_neuron"] < 48


def test_minimum_sizes():
    for scope in ("local", "global"):
        plan = plan_pruning(
            DEPENDENCIES, SCORES, target_params=0.72, scope=scope,
            minimum={"attention_head": 3, "mlp_neuron": 5},
            kinds=("attention_head", "mlp_neuron", "query_head"),
        )  # fmt: skip
        kept = [plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)]
        assert min(kept) >= 5
        assert all(plan.kept_sizes[f"layers.{i}.attention_head"] == 3 for i in range(4))


def test_protected_layers_are_left_alone():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.5, protect=[0, 3])
    assert {DEPENDENCIES.family(name).layer for name in plan.removal} == {1, 2}
    inner = plan_pruning(
        DEPENDENCIES, SCORES, ratio=0.5, layers=range(1, 4), protect=[3], kinds=("mlp", "mlp_neuron")
    )
    assert all(".1." in f".{name}." or ".2." in f".{name}." for name in (*inner.removal, *inner.dropped))


def test_a_ratio_per_kind():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio={"attention_head": 0.3, "mlp_neuron": 0.5})
    assert {plan.kept_sizes[f"layers.{i}.attention_head"] for i in range(4)} == {2}
    assert {plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)} == {11}
    only = plan_pruning(DEPENDENCIES, SCORES, ratio={"mlp_neuron": 0.5})
    assert all("mlp_neuron" in name for name in only.removal)


def test_a_ratio_of_layers_drops_that_share():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.5, kinds="block")
    assert plan.dropped == ("layers.0", "layers.1")
    assert plan_pruning(DEPENDENCIES, SCORES, ratio=0.999, kinds="block").dropped == (
        "layers.0",
        "layers.1",
        "layers.2",
    )


def test_groups_in_dropped_layers_are_not_named():
    plan = plan_pruning(DEPENDENCIES, SCORES, ratio=0.5, kinds=("mlp_neuron", "block"))
    assert set(plan.dropped) == {"layers.0", "layers.1"}
    assert set(plan.removal) == {"layers.2.mlp_neuron", "layers.3.mlp_neuron"}
    assert plan.kept_sizes["layers.0.mlp_neuron"] == 0 == plan.kept_sizes["layers.1.attention_head"]


def test_round_to_holds_in_the_global_scope():
    plan = plan_pruning(
        DEPENDENCIES, SCORES, target_params=0.8, kinds="mlp_neuron", round_to=4, scope="global"
    )
    sizes = [plan.kept_sizes[f"layers.{i}.mlp_neuron"] for i in range(4)]
    assert all(size % 4 == 0 or size == 22 for size in sizes)
    group = one_group("target_params", ("mlp_neuron",))
    assert 0.8 * plan.params_before - 4 * group < plan.params_after <= 0.8 * plan.params_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2, "target_macs": 0.5, "target_bytes": 9}, "got ratio and target_macs and target_bytes"),
        ({"target_macs": 0}, "target_macs 0 is no budget"),
        ({"target_bytes": float("inf")}, "target_bytes inf is no budget"),
        ({"target_macs": 10**12}, "above the dense model's .* multiply-accumulates"),
        ({"target_bytes": 10**12}, "above the dense model's .* bytes"),
        ({"target_macs": 0.01}, "target_macs .* out of reach: with one group left in each of the 8"),
        ({"target_bytes": 1001, "scope": "global"}, "out of reach: with 1 to 3 groups left in each of the 8"),
        ({"target_params": 0.9, "kinds": "vocabulary"}, "cannot be cut here: the tokenizer"),
        ({"ratio": 0.2, "protect": [4]}, "protect 4 to 4 asked for; the model has 4 layers"),
        ({"ratio": 0.2, "protect": range(4)}, "protect leaves no layer"),
        ({"ratio": 0.2, "layers": [1], "protect": [1]}, "protect leaves no layer"),
        ({"ratio": 0.2, "layers": range(3), "uniform": True}, "uniform=True keeps one width in every layer"),
        ({"ratio": 0.2, "protect": [0], "uniform": True}, "uniform=True keeps one width"),
        ({"ratio": 0.2, "minimum": 4}, r"minimum 4 cannot be met by layers\.0\.attention_head: it has 3"),
        ({"ratio": 0.2, "minimum": 0}, "minimum must be a whole number of at least 1"),
        ({"ratio": {"neurons": 0.2}}, "unknown kind 'neurons' in ratio"),
        ({"ratio": {"mlp_neuron": 1.2}}, r"ratio 1.2 is outside \[0, 1\)"),
        ({"ratio": 0.2, "ranking": GlobalRanking()}, "only scope='global' does"),
        ({"ratio": 0.2, "preset": "finest"}, "unknown preset 'finest'; valid are paper"),
        ({"ratio": 0.2, "kinds": "block", "layers": [1]}, "no scores for unit of depth 'layers.1'"),
    ],
)  # fmt: skip
def test_refusals(options, message):
    scores = SCORES if "block" not in options.get("kinds", ()) else {}
    with pytest.raises(ValueError, match=message):
        plan_pruning(DEPENDENCIES, scores, **options)


def test_uniform_wants_equal_sizes():
    model = DEPENDENCIES._model
    uneven = prune(model, PruningPlan.from_removal(DEPENDENCIES, {"layers.1.mlp_neuron": [0, 1]}))
    dependencies = discover(uneven)
    with pytest.raises(ValueError, match="mlp_neuron families of this model have 20, 22 groups"):
        plan_pruning(dependencies, scores_for(dependencies), ratio=0.5, kinds="mlp_neuron", uniform=True)
