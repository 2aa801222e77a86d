"""One ranking across families: standardisation, costs, floors, by hand."""

import numpy as np
import pytest
import torch
from test_planning import dependencies_of, scores_for

from pruner_lib.pruning import PRESETS, GlobalRanking, Preset, plan_pruning
from pruner_lib.pruning.ladders import columns_of, family_ladder
from pruner_lib.pruning.ranking import OVER, STANDARDISE, WEIGH, _standardise, ranked_steps
from pruner_lib.pruning.selection import Limits

DEPENDENCIES = dependencies_of()
SCORES = scores_for(DEPENDENCIES)
BARE = {"standardise": "none", "weigh": "none", "floor": 0.0}


def neurons(first, *others):
    """Scores of the 22 neurons of each of four layers: given values first, then 100."""
    rows = [first, *others, *[[]] * (3 - len(others))]
    return {
        f"layers.{i}.mlp_neuron": torch.tensor([*row, *[100.0] * (22 - len(row))])
        for i, row in enumerate(rows)
    }


def plan(scores, count, **ranking):
    """The global plan that removes so many neurons (3·18 weights each)."""
    dense = plan_pruning(DEPENDENCIES, SCORES, ratio=0).params_before
    return plan_pruning(
        DEPENDENCIES, scores, target_params=dense - count * 54, scope="global", kinds="mlp_neuron",
        ranking=GlobalRanking(**{**BARE, **ranking}),
    )  # fmt: skip


def test_the_lowest_scores_of_all_layers_go():
    found = plan(neurons([5.0, 1.0, 4.0], [2.0, 3.0, 6.0], [0.5]), count=4)
    assert dict(found.removal) == {
        "layers.0.mlp_neuron": (1,), "layers.1.mlp_neuron": (0, 1), "layers.2.mlp_neuron": (0,)
    }  # fmt: skip


def test_a_standardised_family_does_not_lose_everything_for_being_small():
    scores = neurons([1.0, 2.0], [1.0, 2.0])
    scores["layers.1.mlp_neuron"] = scores["layers.1.mlp_neuron"] / 1000
    assert set(plan(scores, count=4).removal) == {"layers.1.mlp_neuron"}
    for how in ("mean", "max", "sum", "rms", "zscore", "rank"):
        found = plan(scores, count=4, standardise=how)
        assert found.removal["layers.0.mlp_neuron"] == found.removal["layers.1.mlp_neuron"] == (0, 1), how
        by_kind = plan(scores, count=4, standardise=how, over="kind")
        assert set(by_kind.removal) == {"layers.1.mlp_neuron"}, how


@pytest.mark.parametrize("how", STANDARDISE)
def test_standardised_scores_by_formula(how):
    scores = np.array([1.0, 2.0, 4.0, 9.0])
    expected = {
        "none": scores,
        "mean": scores / 4,
        "max": scores / 9,
        "sum": scores / 16,
        "rms": scores / np.sqrt(102 / 4),
        "zscore": (scores - 4) / np.sqrt((9 + 4 + 0 + 25) / 4),
        "robust": (scores - 3) / 1.5,  # median 3, deviations 2, 1, 1, 6
        "rank": np.array([0.125, 0.375, 0.625, 0.875]),
    }[how]
    np.testing.assert_allclose(_standardise(scores, scores, how), expected, rtol=1e-12)
    flat = _standardise(np.zeros(3), np.zeros(3), how)
    assert np.isfinite(flat).all() and len(set(flat.tolist())) == 1


def test_ties_share_a_rank():
    np.testing.assert_allclose(
        _standardise(np.array([1.0, 1.0]), np.array([1.0, 1.0, 2.0]), "rank"), [1 / 3, 1 / 3]
    )


@pytest.mark.parametrize("weigh", WEIGH)
def test_cost_in_the_denominator(weigh):
    """A head has 2·3·4·18 + 2·4·18 = 576 weights, a neuron 54: 5/576 < 1/54, though 5 > 1."""
    scores = {f.name: torch.full((f.size,), 1e6) for f in DEPENDENCIES.families}
    scores["layers.0.attention_head"] = torch.tensor([5.0, 1e6, 1e6])
    scores["layers.1.mlp_neuron"] = torch.tensor([1.0, *[1e6] * 21])
    columns = columns_of(
        [
            family_ladder(DEPENDENCIES.family(name), scores, Limits())
            for name in list(scores)
            if name.endswith(("attention_head", "mlp_neuron"))
        ],
        uniform=False,
    )
    prices = [576 if column.kind == "attention_head" else 54 for column in columns]
    steps = ranked_steps(columns, GlobalRanking(standardise="none", weigh=weigh), prices)
    first, second = (columns[steps.column[place]].name for place in (0, 1))
    expected = ["layers.0.attention_head", "layers.1.mlp_neuron"]
    assert [first, second] == (expected[::-1] if weigh == "none" else expected)


@pytest.mark.parametrize(("room", "first"), [(576, "layers.0.attention_head"), (54, "layers.1.mlp_neuron")])
def test_a_dear_group_goes_only_where_more_than_half_of_it_is_needed(room, first):
    scores = {f.name: torch.full((f.size,), 1e6) for f in DEPENDENCIES.families}
    scores["layers.0.attention_head"] = torch.tensor([5.0, 1e6, 1e6])
    scores["layers.1.mlp_neuron"] = torch.tensor([1.0, *[1e6] * 21])
    ranking = GlobalRanking(standardise="none", floor=0)
    dense = plan_pruning(DEPENDENCIES, SCORES, ratio=0).params_before
    found = plan_pruning(DEPENDENCIES, scores, target_params=dense - room, scope="global", ranking=ranking)
    assert dict(found.removal) == {first: (0,)}


def test_the_floor_keeps_a_family_from_vanishing():
    scores = neurons([])
    scores["layers.2.mlp_neuron"] = torch.zeros(22)
    assert plan(scores, count=21).kept_sizes["layers.2.mlp_neuron"] == 1
    assert plan(scores, count=30, floor=0.4).kept_sizes["layers.2.mlp_neuron"] == 9
    assert plan(scores, count=30, floor={"mlp_neuron": 0.5}).kept_sizes["layers.2.mlp_neuron"] == 11
    assert plan(scores, count=21, floor={"attention_head": 0.5}).kept_sizes["layers.2.mlp_neuron"] == 1


def test_a_weight_protects_a_kind():
    kept = []
    for weight in (0.1, 1.0, 10.0):
        ranking = GlobalRanking(kind_weights={"attention_head": weight}, floor=0)
        found = plan_pruning(DEPENDENCIES, SCORES, target_params=0.75, scope="global", ranking=ranking)
        kept.append(sum(found.kept_sizes[f"layers.{i}.attention_head"] for i in range(4)))
    assert kept[0] <= kept[1] <= kept[2] and kept[0] < kept[2]


def test_negative_standardised_scores_survive_the_cost():
    """Shifted before they are divided: a dear group must not gain from a negative score."""
    ranking = GlobalRanking(standardise="zscore", weigh="params", floor=0)
    found = plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, scope="global", ranking=ranking)
    lowest = {n: int(SCORES[n].argmin()) for n in found.removal}
    assert all(lowest[name] in groups for name, groups in found.removal.items())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_global_ratio_leaves_as_many_parameters_as_the_local_one(ratio):
    local = plan_pruning(DEPENDENCIES, SCORES, ratio=ratio)
    one = plan_pruning(DEPENDENCIES, SCORES, ratio=ratio, scope="global", ranking=GlobalRanking(floor=0))
    assert local.params_after - 54 < one.params_after <= local.params_after
    assert dict(one.removal) != dict(local.removal)


def test_query_heads_stay_equal_in_every_kv_group():
    kinds = ("query_head", "attention_head", "mlp_neuron")
    found = plan_pruning(DEPENDENCIES, SCORES, target_params=0.7, scope="global", kinds=kinds)
    for layer in range(4):
        heads, queries = (
            found.kept_sizes[f"layers.{layer}.{kind}"] for kind in ("attention_head", "query_head")
        )
        assert queries % heads == 0


def test_depth_and_width_in_one_ranking():
    units = {f"layers.{i}": torch.tensor([score]) for i, score in enumerate((50.0, 0.01, 50.0, 50.0))}
    found = plan_pruning(
        DEPENDENCIES, {**SCORES.scores, **units}, target_params=0.7, scope="global",
        kinds=("attention_head", "mlp_neuron", "block"),
    )  # fmt: skip
    assert found.dropped == ("layers.1",)
    assert found.removal and not any(name.startswith("layers.1.") for name in found.removal)
    assert 0.7 * found.params_before - 54 < found.params_after <= 0.7 * found.params_before


def test_presets_give_what_is_not_given():
    mine = Preset(scope="global", kinds=("mlp_neuron",), ranking=GlobalRanking(standardise="rank"))
    by_preset = plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, preset=mine)
    spelt_out = plan_pruning(
        DEPENDENCIES, SCORES, target_params=0.8, scope="global", kinds="mlp_neuron", ranking=mine.ranking
    )
    assert dict(by_preset.removal) == dict(spelt_out.removal)
    local = plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, preset=mine, scope="local")
    assert dict(local.removal) == dict(
        plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, kinds="mlp_neuron").removal
    )
    for name in PRESETS:
        assert plan_pruning(DEPENDENCIES, SCORES, target_params=0.8, preset=name).params_after > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standardise": "softmax"}, "unknown standardise 'softmax'; valid are none, mean"),
        ({"over": "layer"}, f"valid are {', '.join(OVER)}"),
        ({"weigh": "flops"}, "unknown weigh 'flops'"),
        ({"floor": 1.5}, r"floor 1.5 is outside \[0, 1\]"),
        ({"floor": {"mlp_neuron": -1}}, "floor -1 of mlp_neuron"),
        ({"floor": "0.3"}, "floor '0.3' is outside"),
        ({"kind_weights": {"mlp_neuron": "2"}}, "weight of mlp_neuron must be positive, not '2'"),
        ({"floor": {"neuron": 0.1}}, "unknown kind 'neuron' in floor"),
        ({"kind_weights": {"mlp_neuron": 0}}, "weight of mlp_neuron must be positive"),
        ({"kind_weights": {"heads": 1}}, "unknown kind 'heads' in kind_weights"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalRanking(**options)


def test_floors_do_not_change_what_a_ratio_stands_for():
    """The local plan has no floors; a global one that may not go so far says so."""
    local = plan_pruning(DEPENDENCIES, SCORES, ratio=0.5)
    options = {"ratio": 0.5, "scope": "global"}
    low = plan_pruning(DEPENDENCIES, SCORES, **options, ranking=GlobalRanking(floor=0.3))
    assert local.params_after - 54 < low.params_after <= local.params_after
    with pytest.raises(ValueError, match=r"ratio 0.5, in the global scope .* out of reach.*smaller ratio"):
        plan_pruning(DEPENDENCIES, SCORES, **options, ranking=GlobalRanking(floor=0.9))


@pytest.mark.parametrize("how", ["none", "zscore"])
def test_a_weight_protects_a_kind_of_negative_values_too(how):
    """v = w·s of a negative s would fall where it should rise."""
    scores = {name: values - 0.5 for name, values in SCORES.scores.items()}

    def heads_left(weight):
        ranking = GlobalRanking(**{**BARE, "standardise": how}, kind_weights={"attention_head": weight})
        found = plan_pruning(DEPENDENCIES, scores, target_params=0.7, scope="global", ranking=ranking)
        return sum(found.kept_sizes[f"layers.{i}.attention_head"] for i in range(4))

    assert heads_left(0.01) < heads_left(1) <= heads_left(10)


@pytest.mark.parametrize("value", [0.1, 0.5, 0.7, 1e-8])
def test_equal_scores_are_equal_whatever_their_sum_rounds_to(value):
    """The mean of 0.7, 96 times, is not 0.7: its deviation is no information."""
    scores = np.full(96, value)
    for how in ("zscore", "robust"):
        assert not _standardise(scores, scores, how).any()


def test_robust_where_most_scores_are_alike():
    """Half of the neurons never fire: the median deviation is 0, and the mean one takes its place."""
    scores = np.array([0.0] * 6 + [2.0, 4.0, 6.0])
    np.testing.assert_allclose(_standardise(scores, scores, "robust"), scores / (12 / 9))


def test_ties_do_not_hang_on_the_order_of_kinds():
    zeros = {name: 0 * values for name, values in SCORES.scores.items()}
    kinds = ("mlp_neuron", "attention_head")
    one, other = (
        plan_pruning(DEPENDENCIES, zeros, target_params=0.8, scope="global", kinds=order)
        for order in (kinds, kinds[::-1])
    )
    assert dict(one.removal) == dict(other.removal)


def test_a_preset_of_one_kind():
    assert Preset(kinds="mlp_neuron").kinds == ("mlp_neuron",)
