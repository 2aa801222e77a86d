"""Several steps, scored anew each time, that end where one step would."""

import copy

import numpy as np
import pytest
import torch
from test_surgery import logits, tiny

from pruner_lib.checkpoint import load_pruned, save_pruned
from pruner_lib.discovery import discover
from pruner_lib.discovery.units import depth_units
from pruner_lib.importance import estimate_importance, score_layers
from pruner_lib.pruning import GlobalRanking, Preset, plan_pruning, prune, prune_iteratively

BATCHES = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))


def score(model, dependencies):
    return estimate_importance(model, dependencies, BATCHES, criterion="l2")


def grouped():
    return tiny("llama", num_attention_heads=8, num_key_value_heads=4)


def widths(model):
    """(query heads, KV heads, neurons) of each layer, read off the weights; a head has 4 channels."""
    layers = model.model.layers
    return [
        (
            x.self_attn.q_proj.weight.shape[0] // 4,
            x.self_attn.k_proj.weight.shape[0] // 4,
            x.mlp.down_proj.weight.shape[1],
        )
        for x in layers
    ]


@pytest.mark.parametrize("kinds", [("attention_head", "mlp_neuron"), ("query_head", "mlp_neuron")])
def test_the_last_step_has_the_sizes_of_one_step(kinds):
    """Under grouped-query attention too, down to one KV head, where LLM-Pruner stops with an error."""
    model = grouped()
    steps = list(prune_iteratively(model, score, steps=3, ratio=0.7, kinds=kinds))
    once = plan_pruning(discover(model), score(model, discover(model)), ratio=0.7, kinds=kinds)
    assert sum(p.numel() for p in steps[-1].model.parameters()) == once.params_after
    sizes = [step.plan.params_after for step in steps]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert torch.isfinite(logits(steps[-1].model)).all()
    heads, kv, neurons = widths(steps[-1].model)[0]
    assert heads % kv == 0 and neurons == 48 - 34


def test_scores_are_taken_anew_from_what_is_left():
    model, seen = grouped(), []

    def watched(current, dependencies):
        seen.append((current, sum(f.size for f in dependencies.select(kind="mlp_neuron"))))
        return score(current, dependencies)

    steps = list(prune_iteratively(model, watched, steps=3, ratio=0.5, kinds="mlp_neuron"))
    assert [neurons for _, neurons in seen] == [144, 120, 96]
    assert seen[0][0] is model and seen[1][0] is steps[0].model and seen[2][0] is steps[1].model
    assert "1 of 3" in repr(steps[0])


@pytest.mark.parametrize("target", ["target_params", "target_macs", "target_bytes"])
def test_a_target_is_approached_evenly(target):
    measure = {"target_params": "params", "target_macs": "macs", "target_bytes": "weight_bytes"}[target]
    model = grouped()
    options = {target: 0.8, "scope": "global", "ranking": GlobalRanking(floor=0.2)}
    costs = [
        getattr(step.plan.cost(), measure) for step in prune_iteratively(model, score, steps=2, **options)
    ]
    dense = getattr(plan_pruning(discover(model), score(model, discover(model)), ratio=0).cost(), measure)
    assert costs[0] == pytest.approx(0.9 * dense, rel=0.01) and costs[1] == pytest.approx(
        0.8 * dense, rel=0.01
    )
    assert costs[1] <= 0.8 * dense


def test_what_happens_between_steps_is_pruned_next():
    calls = []

    def between(model):
        calls.append(model)
        mended = copy.deepcopy(model)
        mended.repaired = True
        return mended

    steps = list(prune_iteratively(grouped(), score, steps=3, between=between, ratio=0.3))
    assert calls == [steps[0].model, steps[1].model] and steps[-1].model.repaired


def test_layers_may_go_step_by_step():
    model = tiny("llama", num_hidden_layers=4)

    def by_influence(current, dependencies):
        return score_layers(current, dependencies, BATCHES)

    steps = list(prune_iteratively(model, by_influence, steps=2, ratio=0.5, kinds="block"))
    assert [step.model.config.num_hidden_layers for step in steps] == [3, 2]


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (4, {"ratio": 0.34, "kinds": "block"}),
        (16, {"target_params": 0.9, "kinds": "attention_head"}),
        (40, {"target_params": 0.97}),
        (16, {"target_macs": 0.9, "kinds": "attention_head", "scope": "global"}),
        (16, {"target_bytes": 0.9, "kinds": "attention_head"}),
    ],
)
def test_a_step_that_went_too_far_is_followed_by_empty_ones(steps, options):
    """A layer or a head is more than one step asks for; the goal of the next is met before it begins."""

    def by_name(current, dependencies):
        units = score_layers(current, dependencies, BATCHES).scores if options.get("kinds") == "block" else {}
        return {**score(current, dependencies).scores, **units}

    model = tiny("llama", num_attention_heads=8, num_key_value_heads=8)
    dependencies = discover(model)
    once = plan_pruning(dependencies, by_name(model, dependencies), **options)
    done = list(prune_iteratively(model, by_name, steps=steps, **options))
    assert [step.number for step in done] == list(range(1, steps + 1))
    empty = [step for step in done if not step.plan.removal and not step.plan.dropped]
    assert empty and empty[0].plan.params_after == empty[0].plan.params_before
    assert torch.isfinite(logits(empty[0].model)).all()
    assert sum(p.numel() for p in done[-1].model.parameters()) == once.params_after


def test_a_target_is_met_as_closely_as_in_one_step():
    model = grouped()
    dense = sum(p.numel() for p in model.parameters())
    for scope in ("local", "global"):
        for share in (0.75, 0.83, 0.91):
            *_, last = prune_iteratively(model, score, steps=3, target_params=share, scope=scope)
            left = last.plan.params_after
            assert share * dense - 3 * 32 < left <= share * dense, "less than a neuron below"


@pytest.mark.parametrize("budget", [{"target_params": 0.68}, {"ratio": 0.35}])
def test_the_floor_is_a_share_of_the_dense_model_in_every_step(budget):
    """Heads are worth nothing here; a floor taken anew from each step's model would halve them every time."""
    model = tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=40)
    ranking = GlobalRanking(
        standardise="none",
        weigh="none",
        floor={"attention_head": 0.5, "mlp_neuron": 0.5},
        kind_weights={"attention_head": 1e-9},
    )
    options = {"scope": "global", "ranking": ranking, **budget}
    once = plan_pruning(discover(model), score(model, discover(model)), **options)
    heads = [once.kept_sizes[f"layers.{i}.attention_head"] for i in range(3)]
    *_, last = prune_iteratively(model, score, steps=4, **options)
    found = discover(last.model)
    assert [found.family(f"layers.{i}.attention_head").size for i in range(3)] == heads == [4, 4, 4]
    assert all(found.family(f"layers.{i}.mlp_neuron").size >= 20 for i in range(3))
    assert abs(last.plan.params_after - once.params_after) < 3 * 64, "less than a neuron apart"


@pytest.mark.parametrize("share", [0.45, 0.52])
def test_floors_hold_where_layers_are_dropped_and_renumbered(share):
    model = tiny("llama", num_hidden_layers=6)
    ranking = GlobalRanking(floor={"block": 0.5, "mlp_neuron": 0.5}, kind_weights={"block": 1e-9})

    def both(current, dependencies):
        return {
            **score(current, dependencies).scores,
            **score_layers(current, dependencies, BATCHES).scores,
        }

    *_, last = prune_iteratively(
        model,
        both,
        steps=4,
        target_params=share,
        scope="global",
        kinds=("block", "mlp_neuron"),
        ranking=ranking,
    )
    assert last.model.config.num_hidden_layers >= 3
    assert min(layer.mlp.down_proj.in_features for layer in last.model.model.layers) >= 24
    assert last.plan.params_after <= share * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_query_heads_are_not_taken_for_the_kv_head_whose_name_they_get(arch):
    """With one KV head left, ``attention_head`` are its query heads; nobody asked for those."""
    model = tiny(arch, num_attention_heads=8, num_key_value_heads=2)
    ranking = GlobalRanking(floor=0, kind_weights={"attention_head": 1e-9})
    once = plan_pruning(
        discover(model), score(model, discover(model)), target_params=0.6, scope="global", ranking=ranking
    )
    *_, last = prune_iteratively(model, score, steps=6, target_params=0.6, scope="global", ranking=ranking)
    assert [once.kept_sizes[f"layers.{i}.attention_head"] for i in range(3)] == [1, 1, 1]
    found = discover(last.model)
    assert [found.family(f"layers.{i}.attention_head").size for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_query_heads_go_on_when_one_kv_head_is_left(arch):
    model = tiny(arch, num_attention_heads=16, num_key_value_heads=2, hidden_size=64)
    kinds = ("attention_head", "query_head")
    once = plan_pruning(discover(model), score(model, discover(model)), ratio=0.75, kinds=kinds)
    *_, last = prune_iteratively(model, score, steps=3, ratio=0.75, kinds=kinds)
    assert sum(p.numel() for p in last.model.parameters()) == once.params_after


def test_limits_mean_the_dense_model_when_its_parts_go():
    """8 of 16 query heads stay, 2 of each KV head; with 3 of the 4 KV heads gone these are 2, not 8."""
    model = tiny("llama", hidden_size=64, num_attention_heads=16, num_key_value_heads=4)
    options = {"kinds": ("attention_head", "query_head"), "target_params": 0.66}
    options |= {"minimum": {"query_head": 8}, "round_to": {"query_head": 8}}
    *_, last = prune_iteratively(model, score, steps=5, **options)
    assert all(q % kv == 0 and q // kv >= 2 for q, kv, _ in widths(last.model))
    assert min(kv for _, kv, _ in widths(last.model)) == 1


def test_a_family_of_one_group_is_left_alone():
    """Once every layer has one head there is no kind ``attention_head`` any more; neurons go on."""
    model = tiny("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    ranking = GlobalRanking(floor=0, kind_weights={"attention_head": 1e-9})
    done = list(prune_iteratively(model, score, steps=6, target_params=0.6, scope="global", ranking=ranking))
    assert all(layer.self_attn.k_proj.out_features == 4 for layer in done[-1].model.model.layers)
    assert done[-1].plan.params_after <= 0.6 * done[0].plan.params_before


@pytest.mark.parametrize("other", ["gpt2", "llama"])
def test_another_model_from_between_is_refused(other):
    """One of other names, and the dense one again, whose sizes are other ones."""
    for options in ({"ratio": 0.5}, {"target_params": 0.8}):
        steps = prune_iteratively(grouped(), score, steps=2, between=lambda _: tiny(other), **options)
        next(steps)
        with pytest.raises(ValueError, match=r"in the model it returned it is .* Return the model that was"):
            next(steps)


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), [np.int64(1)], iter([1])])
def test_layers_may_be_numbers_of_numpy_and_torch(one):
    *_, last = prune_iteratively(grouped(), score, steps=2, ratio=0.5, kinds="mlp_neuron", layers=one)
    assert [neurons for *_, neurons in widths(last.model)] == [48, 24, 48]


def test_a_preset_is_approached_like_its_arguments():
    mine = Preset(scope="global", kinds=("mlp_neuron",))
    by_preset = list(prune_iteratively(grouped(), score, steps=2, ratio=0.4, preset=mine))
    spelt = list(
        prune_iteratively(grouped(), score, steps=2, ratio=0.4, scope="global", kinds=iter(["mlp_neuron"]))
    )
    assert [dict(s.plan.removal) for s in by_preset] == [dict(s.plan.removal) for s in spelt]


@pytest.mark.parametrize(
    ("arch", "shape", "options"),
    [
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}, {"ratio": 0.7}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, {"ratio": 0.5}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4},
         {"target_params": 0.7, "scope": "global"}),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 64},
         {"ratio": 0.75, "kinds": ("attention_head", "query_head")}),
        ("gpt2", {}, {"ratio": 0.5, "kinds": ("mlp_neuron", "hidden_channel")}),
        ("gpt_neox", {}, {"ratio": 0.5}),
    ],
)  # fmt: skip
def test_the_steps_together_are_one_plan_for_the_dense_model(arch, shape, options):
    model = tiny(arch, **shape)
    for step in prune_iteratively(model, score, steps=3, **options):
        at_once = prune(model, step.total)
        expected = step.model.state_dict()
        found = at_once.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert torch.equal(logits(at_once), logits(step.model))


@pytest.mark.parametrize("kinds", ["block", "mlp", ("block", "mlp"), ("attention", "mlp_neuron")])
def test_dropped_layers_are_in_the_plan_of_all_steps(kinds):
    model = tiny("llama", num_hidden_layers=5)

    def by_influence(current, dependencies):
        layers = score_layers(current, dependencies, BATCHES, unit=("block", "attention", "mlp")).scores
        return {**layers, **score(current, dependencies).scores}

    *_, last = prune_iteratively(model, by_influence, steps=4, ratio=0.6, kinds=kinds)
    assert last.total.dropped
    at_once = prune(model, last.total)
    assert at_once.config.num_hidden_layers == last.model.config.num_hidden_layers
    assert torch.equal(logits(at_once), logits(last.model))


@pytest.mark.filterwarnings("ignore:.*calibration tokens for")
def test_each_compensated_step_is_fitted_to_the_dense_model():
    """And is what is scored next."""
    model, seen = grouped(), []

    def watched(current, dependencies):
        seen.append(current)
        return score(current, dependencies)

    steps = list(prune_iteratively(model, watched, steps=3, target_params=0.7, compensate=BATCHES))
    assert seen[0] is model and seen[1] is steps[0].model and seen[2] is steps[1].model
    for step in steps:
        fitted = prune(model, step.total, compensate=BATCHES).state_dict()
        assert all(torch.equal(fitted[name], value) for name, value in step.model.state_dict().items())
        cut = prune(model, step.total).state_dict()
        assert any(not torch.equal(cut[name], value) for name, value in step.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*calibration tokens for")
def test_the_last_step_is_saved_with_the_plan_of_all(tmp_path):
    options = {"target_params": 0.7, "scope": "global", "compensate": BATCHES}
    *_, last = prune_iteratively(grouped(), score, steps=2, **options)
    save_pruned(last.model, tmp_path / "saved", plan=last.total)
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(last.model))


def test_compensation_takes_the_place_of_what_is_done_between():
    options = {"ratio": 0.5, "between": copy.deepcopy, "compensate": BATCHES}
    with pytest.raises(ValueError, match="give between or compensate"):
        prune_iteratively(grouped(), score, **options)
    with pytest.raises(TypeError, match="compensate wants calibration token ids"):
        prune_iteratively(grouped(), score, ratio=0.5, compensate=True)


def test_the_given_model_is_untouched():
    model = grouped()
    before = copy.deepcopy(model.state_dict())
    for step in prune_iteratively(model, score, steps=2, ratio=0.5):
        torch.nn.init.zeros_(step.model.lm_head.weight)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "ratio": 0.5}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5, "ratio": 0.5}, "steps must be a whole number of at least 1, not 2.5"),
        ({"ratio": 1.5}, r"ratio 1.5 is outside"),
        ({"ratio": 0.5, "kinds": ("block", "mlp_neuron"), "layers": [1]}, "renumbers the layers"),
        ({"ratio": 0.5, "kinds": ("block", "mlp_neuron"), "protect": 0}, "renumbers the layers"),
        ({"target_params": 0.001}, "out of reach"),
        ({}, "give exactly one of"),
    ],
)
def test_refused_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        prune_iteratively(tiny(), score, **options)


@pytest.mark.parametrize("compensate", [None, torch.arange(600).reshape(20, 30) % 61 + 3])
@pytest.mark.parametrize(
    "kinds", [("mlp", "hidden_channel"), ("block", "hidden_channel"), ("attention", "mlp_neuron")]
)
def test_what_spans_the_layers_is_followed_past_a_dropped_one(kinds, compensate):
    """Slices that went with a layer say nothing of the rest of their group."""
    model = tiny("llama", num_hidden_layers=4)

    def random(current, dependencies):
        generator = torch.Generator().manual_seed(3)
        units = depth_units(dependencies)
        sizes = {family.name: family.size for family in dependencies.families} | dict.fromkeys(units, 1)
        return {name: torch.rand(size, generator=generator) for name, size in sizes.items()}

    ranking = GlobalRanking(standardise="none", floor=dict.fromkeys(("block", "attention", "mlp"), 0.5))
    options = {"scope": "global", "kinds": kinds, "target_params": 0.45, "ranking": ranking}
    steps = list(prune_iteratively(model, random, steps=3, compensate=compensate, **options))
    for step in steps:
        assert step.total.params_after == sum(p.numel() for p in step.model.parameters())
    assert steps[-1].total.dropped and any("hidden" in name for name in steps[-1].total.removal) == (
        "hidden_channel" in kinds
    )
    assert steps[-1].total.params_after <= 0.45 * steps[-1].total.params_before
