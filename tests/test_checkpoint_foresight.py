"""What a plan's model will open in, foreseen, is what the cut model is found to open in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_checkpoint import UNEVEN, UNIFORM, tiny

from pruner_lib.checkpoint import Foresight, compatibility, foresight
from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan, prune

ALL = {f"layers.{i}.mlp_neuron": [0, 4, 9, 11, *range(16, 28)] for i in range(3)}  # 32 of 48 stay


CASES = {
    "dense": ("llama", {}),
    "round": ("llama", ALL),
    "heads uneven": ("llama", UNEVEN),
    "neurons differ": ("llama", {**ALL, "layers.1.mlp_neuron": [5]}),
    "channels": ("llama", {"hidden_channel": [0, 7]}),
    "gemma": ("gemma", {"layers.1.mlp_neuron": [0, 2, 4]}),
    "gpt2 neurons": ("gpt2", ALL),
}


@pytest.mark.parametrize("case", CASES)
def test_foreseen_is_found(case: str) -> None:
    kind, removal = CASES[case]
    model = tiny(kind, **({"head_dim": 8} if kind == "gemma" else {}))
    plan = PruningPlan.from_removal(discover(model), removal)
    assert Foresight(model)(plan) == compatibility(prune(model, plan))


def test_a_dropped_layer_is_foreseen() -> None:
    model = tiny()
    plan = PruningPlan.from_removal(discover(model), {"layers.0.mlp_neuron": [1]}, dropped=["layers.1"])
    assert Foresight(model)(plan) == compatibility(prune(model, plan))
    half = PruningPlan.from_removal(discover(model), {}, dropped=["layers.1.mlp"])
    assert not Foresight(model)(half)["transformers"].opens


def test_a_pattern_is_tried_once_and_rows_are_counted_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    dependencies = discover(model)
    calls: list[int] = []
    original: Callable[..., object] = foresight.find_blueprint
    monkeypatch.setattr(foresight, "find_blueprint", lambda *a: calls.append(1) or original(*a))
    foreseen = Foresight(model)
    verdicts = []
    for count in (16, 15, 14):
        removal = {f"layers.{i}.mlp_neuron": range(count) for i in range(3)}
        plan = PruningPlan.from_removal(dependencies, removal)
        verdicts.append(foreseen(plan)["llama.cpp q4_0, q5_0, q8_0"].verdict)
        assert foreseen.knows(plan)
    assert len(calls) == 1
    assert verdicts == ["yes", "partly", "partly"], "32 neurons make whole blocks, 33 and 34 do not"


def test_the_model_is_not_touched_and_other_modules_get_an_answer() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dependencies = discover(model)
    Foresight(model)(PruningPlan.from_removal(dependencies, UNIFORM))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    toy = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    found = discover(toy, example_inputs={"input": torch.zeros(1, 3)})
    answer = Foresight(toy)(PruningPlan.from_removal(found, {}))["transformers"]
    assert not answer.opens and "no model of transformers" in answer.why
