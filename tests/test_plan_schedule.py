"""Several steps, scored anew each time, that end where one step would."""

import copy

import pytest
import torch
from test_surgery import logits, tiny

from pruner_lib.discovery import discover
from pruner_lib.importance import estimate_importance, score_layers
from pruner_lib.pruning import GlobalRanking, Preset, plan_pruning, prune_iteratively

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


def test_a_preset_is_approached_like_its_arguments():
    mine = Preset(scope="global", kinds=("mlp_neuron",))
    by_preset = list(prune_iteratively(grouped(), score, steps=2, ratio=0.4, preset=mine))
    spelt = list(
        prune_iteratively(grouped(), score, steps=2, ratio=0.4, scope="global", kinds=iter(["mlp_neuron"]))
    )
    assert [dict(s.plan.removal) for s in by_preset] == [dict(s.plan.removal) for s in spelt]


def test_the_given_model_is_untouched():
    model = grouped()
    before = copy.deepcopy(model.state_dict())
    for step in prune_iteratively(model, score, steps=2, ratio=0.5):
        torch.nn.init.zeros_(step.model.lm_head.weight)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "ratio": 0.5}, "steps must be at least 1"),
        ({"ratio": 1.5}, r"ratio 1.5 is outside"),
        ({"ratio": 0.5, "kinds": ("block", "mlp_neuron"), "layers": [1]}, "renumbers the layers"),
        ({"target_params": 0.001}, "out of reach"),
        ({}, "give exactly one of"),
    ],
)
def test_refused_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        prune_iteratively(tiny(), score, **options)
