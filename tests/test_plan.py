"""Plans as data: what they remove, what they leave, what they refuse."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.discovery.families import UnknownFamilyError
from pruner_lib.pruning.plan import PruningPlan


def tiny_llama(**changes):
    settings = {
        "vocab_size": 30, "hidden_size": 18, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture(scope="module")
def dependencies():
    return discover(tiny_llama())


def plan_of(dependencies, **removal):
    spanning = {"hidden_channel"}
    named = {kind if kind in spanning else f"layers.1.{kind}": groups for kind, groups in removal.items()}
    return PruningPlan.from_removal(dependencies, named)


Q, K, O = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qko")  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_indices_of_a_head_by_hand(dependencies):
    plan = plan_of(dependencies, attention_head=[1])
    assert plan.removed_indices(Q)[0].tolist() == list(range(8, 16))  # query heads 2 and 3, 4 channels each
    assert plan.removed_indices(K)[0].tolist() == [4, 5, 6, 7]
    kept = plan.kept_indices(O)
    assert kept[1].tolist() == [*range(8), *range(16, 24)] and kept[1].dtype == torch.int64
    assert plan.kept_indices(DOWN) == {}
    assert plan.removed_indices("model.norm.weight") == {}


def test_families_that_share_a_parameter_are_united(dependencies):
    plan = plan_of(dependencies, attention_head=[0], query_head=[0, 2, 4], hidden_channel=[17])
    # head 0 takes query heads 0 and 1; query heads 2 and 4 go from the two that stay
    assert plan.removed_indices(Q)[0].tolist() == [*range(12), *range(16, 20)]
    assert plan.removed_indices(Q)[1].tolist() == [17]
    assert plan.new_shapes()[Q] == (8, 17) and plan.new_shapes()[O] == (17, 8)


def test_kept_sizes_follow_through_other_families(dependencies):
    sizes = plan_of(dependencies, attention_head=[1], mlp_neuron=[0, 9]).kept_sizes
    assert sizes["layers.1.attention_head"] == 2 and sizes["layers.1.mlp_neuron"] == 8
    assert sizes["layers.1.query_head"] == 4  # two of six went with their KV head
    assert sizes["layers.0.query_head"] == 6 and sizes["hidden_channel"] == 18
    assert list(sizes) == [family.name for family in dependencies.families]


def test_parameters_counted_once_in_two_dimensions_and_when_tied(dependencies):
    dense = sum(p.numel() for p in tiny_llama().parameters())
    plan = plan_of(dependencies, mlp_neuron=[3], hidden_channel=[0, 5])
    assert plan.params_before == dense
    smaller = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=10, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):  # the same widths of q (24) and of k and v (12), hidden size 16
        expected = sum(p.numel() for p in LlamaForCausalLM(smaller).parameters()) - 3 * 16
    assert plan.params_after == expected
    assert plan.num_params_removed == dense - expected


def test_tied_names_mean_one_parameter(dependencies):
    plan = plan_of(dependencies, hidden_channel=[2])
    assert dependencies.aliases
    head, embedding = (plan.kept_indices(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head[1].tolist() == embedding[1].tolist() == [0, 1, *range(3, 18)]


def test_removal_is_sorted_unique_and_fixed(dependencies):
    plan = plan_of(dependencies, mlp_neuron=np.array([7, 3, 7]), attention_head=torch.tensor([2]))
    assert dict(plan.removal) == {"layers.1.attention_head": (2,), "layers.1.mlp_neuron": (3, 7)}
    assert not PruningPlan.from_removal(dependencies, {"layers.0.mlp_neuron": []}).removal
    with pytest.raises(TypeError):
        plan.removal["layers.0.mlp_neuron"] = (1,)
    plan.removed_indices(DOWN)[1][0] = 0  # a copy: the plan does not change
    assert plan.removed_indices(DOWN)[1].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("removal", "error", "message"),
    [
        ({"layers.1.mlp_neurons": [0]}, UnknownFamilyError, r"near names: layers\.1\.mlp_neuron"),
        ({"layers.1.mlp_neuron": [10]}, ValueError, r"no group 10: it has 10 groups, counted from 0 to 9"),
        ({"layers.1.mlp_neuron": [-1]}, ValueError, r"no group -1"),
        ({"layers.1.mlp_neuron": range(10)}, ValueError, r"all 10 groups would go"),
        ({"layers.1.attention_head": range(3)}, ValueError, r"all 3 groups would go"),
        ({"layers.1.mlp_neuron": [0.5]}, ValueError, r"whole numbers"),
        ({"layers.1.mlp_neuron": 3}, ValueError, r"whole numbers"),
        ({"vocabulary": [3]}, ValueError, r"vocabulary cannot be cut: the tokenizer"),
        ({"layers.1.query_head": [0]}, ValueError, r"leaves \{0: 1, 1: 2, 2: 2\}"),
        ({"layers.1.query_head": [0, 1, 2, 3]}, ValueError, r"leaves \{0: 0, 1: 0, 2: 2\}"),
    ],
)
def test_impossible_removals(dependencies, removal, error, message):
    with pytest.raises(error, match=message):
        PruningPlan.from_removal(dependencies, removal)


def test_query_heads_of_a_removed_kv_head_do_not_count(dependencies):
    plan = plan_of(dependencies, attention_head=[0], query_head=[2, 4])
    assert plan.kept_sizes["layers.1.query_head"] == 2
    with pytest.raises(ValueError, match=r"leaves \{1: 1, 2: 2\}"):
        plan_of(dependencies, attention_head=[0], query_head=[2])


def test_prints_what_goes_and_what_stays(dependencies):
    everywhere = {f"layers.{layer}.mlp_neuron": [0, 1] for layer in (0, 1, 2)}
    everywhere["layers.1.attention_head"] = [2]
    lines = str(PruningPlan.from_removal(dependencies, everywhere)).splitlines()
    # 6 neurons of 3·18 and one head of 2·8·18 + 2·4·18 weights
    assert lines[0] == "PruningPlan: 6,174 -> 5,418 parameters (12.2 % removed)"
    assert 6174 - 5418 == 6 * 54 + 432
    assert lines[1].startswith("  0.00 -> 0.00 G multiply-accumulates at 1 × 64 tokens, 0.0 -> 0.0 MiB")
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert rows == {"mlp_neuron": ["0-2", "10", "8", "2"], "attention_head": ["1", "3", "2", "1"]}
    assert "nothing is removed" in str(PruningPlan.from_removal(dependencies, {}))


def test_a_plan_of_many_widths_prints_on_a_screen():
    dependencies = discover(tiny_llama(num_hidden_layers=10))
    removal = {f"layers.{i}.mlp_neuron": range(max(1, i)) for i in range(1, 10) if i != 4}
    dropped = ["layers.4", "layers.0", "layers.5.attention", "layers.6.attention", "layers.8.attention"]
    lines = PruningPlan.from_removal(dependencies, removal, dropped=dropped).summary().splitlines()
    assert lines[1:] == [
        "  dropped whole: layers 0, 4; attention of layers 5-6, 8",
        "  kind            layers            groups    kept  removed",
        "  mlp_neuron      1-3, 5-9              10     1-9      1-9",
    ]


def test_save_and_load(dependencies, tmp_path):
    plan = plan_of(dependencies, attention_head=[1], mlp_neuron=[0, 9])
    again = PruningPlan.load(plan.save(tmp_path / "plan.json"), discover(tiny_llama()))
    assert dict(again.removal) == dict(plan.removal)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert again.params_after == plan.params_after == written["params_after"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 12}, r"layers\.0\.mlp_neuron: 10 in the plan, 12 in the model"),
        ({"num_hidden_layers": 2}, r"layers\.2\.attention_head: 3 in the plan, absent in the model"),
        ({"tie_word_embeddings": False}, r"vocabulary\.2: absent in the plan, 30 in the model"),
    ],
)
def test_a_plan_for_another_model(dependencies, tmp_path, changes, message):
    path = plan_of(dependencies, mlp_neuron=[0]).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=message):
        PruningPlan.load(path, discover(tiny_llama(**changes)))


def test_a_plan_for_a_model_with_the_same_groups_but_other_parameters(dependencies, tmp_path):
    path = plan_of(dependencies, mlp_neuron=[0]).save(tmp_path / "plan.json")
    biased = discover(tiny_llama(mlp_bias=True))
    with pytest.raises(ValueError, match=r"another model: made for 6,174 parameters, this model has 6,2"):
        PruningPlan.load(path, biased)


WRITTEN = '{{"format": "pruner_lib.pruning_plan", "version": 2, "params_before": 1, "families": {{}}, {}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a pruning plan"),
        ('{"format": "pruner_lib.pruning_plan", "version": 9}', "version 9; this library reads versions 1"),
        ('{"format": "pruner_lib.pruning_plan", "version": 1}', "families, params_before, removal missing"),
        (WRITTEN.format('"removal": [1]'), "families and removal are objects"),
        (WRITTEN.format('"removal": {"layers.0.mlp_neuron": 3}'), "the groups of each family a list"),
        (WRITTEN.format('"removal": {}, "dropped": [5]'), "dropped a list of names"),
    ],
)
def test_other_files_are_refused(dependencies, tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        PruningPlan.load(path, dependencies)
