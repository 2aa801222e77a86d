"""Plans, cuts and checkpoints of the default model."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from pruner_lib import count_cost, estimate_importance, load_calibration, perplexity
from pruner_lib.checkpoint import load_pruned, save_pruned
from pruner_lib.discovery import discover
from pruner_lib.importance import score_layers
from pruner_lib.pruning import plan_pruning, prune, prune_iteratively, prune_layers, scan_sensitivity

pytestmark = pytest.mark.real_model
WIDTH = ("attention_head", "mlp_neuron")

# Run where `import pruner_lib` fails: opens folders, and writes down the logits or why not.
PLAIN = """
import json, sys
sys.modules["pruner_lib"] = None
import torch
from transformers import AutoModelForCausalLM
said = {}
for name, folder in json.loads(sys.argv[1]).items():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
        continue
    with torch.no_grad():
        said[name] = model(torch.arange(100, 108)[None]).logits[0, -1].double().tolist()
print(json.dumps(said))
"""


@torch.no_grad()
def logits(model):
    return model(torch.arange(100, 108)[None]).logits


@pytest.fixture(scope="module")
def real(default_model):
    model, tokenizer = default_model
    batches = load_calibration(tokenizer, source="books", num_samples=2, seq_len=64, seed=0)
    dependencies = discover(model)
    names = [family.name for family in dependencies.select(WIDTH)]
    return model, dependencies, estimate_importance(model, dependencies, batches, families=names), batches


@pytest.fixture(scope="module")
def uniform(real):
    model, dependencies, scores, _ = real
    return prune(model, plan_pruning(dependencies, scores, ratio=0.25, uniform=True))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("target", "measure"),
    [("target_params", "params"), ("target_macs", "macs"), ("target_bytes", "weight_bytes")],
)
def test_a_target_is_met_to_within_a_group(real, scope, target, measure):
    """One group of the cheapest kind, an MLP neuron: three rows of 576 weights, 64 tokens, 4 bytes each."""
    _, dependencies, scores, _ = real
    plan = plan_pruning(dependencies, scores, **{target: 0.8}, scope=scope)
    group = 3 * 576 * {"params": 1, "macs": 64, "weight_bytes": 4}[measure]
    wanted = 0.8 * getattr(plan.dense_cost, measure)
    assert wanted - group < getattr(plan.cost(), measure) <= wanted
    if scope == "local" or target == "target_macs":
        assert vars(count_cost(prune(dependencies._model, plan))) == vars(plan.cost())


def test_checkpoints_without_this_library(real, uniform, tmp_path):
    model, dependencies, scores, _ = real
    uneven = prune(model, plan_pruning(dependencies, scores, target_params=0.8, scope="global"))
    thin = prune_layers(model, ["layers.9.attention", "layers.20.mlp"], dependencies=dependencies)
    models = {"uniform": uniform, "uneven": uneven, "thin": thin}
    for name, saved in models.items():
        save_pruned(saved, tmp_path / name)
    folders = json.dumps({name: str(tmp_path / name) for name in models})
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, folders], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    found = torch.tensor(said["uniform"], dtype=torch.float64)
    torch.testing.assert_close(found, logits(uniform)[0, -1].double(), rtol=0, atol=1e-4)  # other threads
    for name in ("uneven", "thin"):
        assert said[name][0] == "AmbiguousGlobalPerLayerAttributeError"
        assert torch.equal(logits(load_pruned(tmp_path / name)), logits(models[name]))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_is_left_is_an_ordinary_model(real, uniform, scope):
    from peft import LoraConfig, get_peft_model

    model, dependencies, scores, _ = real
    plan = plan_pruning(dependencies, scores, ratio=0.25, scope=scope, uniform=scope == "local")
    cut = uniform if scope == "local" else prune(model, plan)
    ids = torch.arange(100, 116)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = cut.generate(ids, use_cache=False, **options)
    assert torch.equal(cut.generate(ids, **options), expected)
    static = cut.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)
    half = copy.deepcopy(cut).to(torch.bfloat16)
    cut_in_half = prune(copy.deepcopy(model).to(torch.bfloat16), plan)
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), cut_in_half.parameters(), strict=True))
    assert logits(half).dtype == torch.bfloat16 and bool(logits(half).isfinite().all())
    adapted = get_peft_model(copy.deepcopy(cut), LoraConfig(r=2, target_modules="all-linear"))
    adapted(ids, labels=ids).loss.backward()
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n and bool(p.grad.abs().max() > 0)]
    assert len(trained) == 7 * 30


def test_pruned_again(uniform):
    """Cut equals zeroed on the real weights, on a model that was cut before."""
    dependencies = discover(uniform)
    removal = {f"layers.{i}.mlp_neuron": list(range(i, 400 + i)) for i in range(3, 20)}
    removal |= {f"layers.{i}.attention_head": [i % 2] for i in range(5, 9)}
    plan = plan_pruning(
        dependencies, {f.name: torch.arange(f.size) for f in dependencies.select(WIDTH)}, ratio=0.3
    )
    for chosen in (plan.removal, removal):
        again = prune(uniform, type(plan).from_removal(dependencies, chosen))
        zeroed = logits(dependencies.zero(uniform, chosen))
        torch.testing.assert_close(logits(again), zeroed, rtol=0, atol=1e-4 * float(zeroed.abs().max()))


def test_steps_end_where_one_step_would(real):
    model, dependencies, scores, batches = real
    planning = {"target_params": 0.85, "kinds": "mlp_neuron"}

    def score(current, found):
        names = [family.name for family in found.select("mlp_neuron")]
        return estimate_importance(current, found, batches, families=names)

    first, last = prune_iteratively(model, score, steps=2, **planning)
    at_once = plan_pruning(dependencies, scores, **planning)
    assert last.plan.params_after == at_once.params_after == count_cost(last.model).params
    middle = (at_once.params_before + at_once.params_after) / 2
    assert first.plan.params_after == pytest.approx(middle, abs=3 * 576)


def test_depth_and_the_scan(real):
    """Both say that an end of the model matters most, and what they spare is worth sparing."""
    model, dependencies, scores, batches = real
    influence = score_layers(model, dependencies, batches)
    ranked = sorted(influence, key=lambda unit: float(influence[unit]))
    assert ranked[-1] in ("layers.0", "layers.29")
    dense, middle, end = (
        float(perplexity(m, None, batches, seq_len=64))
        for m in (
            model,
            prune_layers(model, [ranked[0]], dependencies=dependencies),
            prune_layers(model, [ranked[-1]], dependencies=dependencies),
        )
    )
    assert middle < 3 * dense and middle < end
    scan = scan_sensitivity(model, dependencies, scores, batches[:1], kinds="mlp_neuron")
    rises, proposed = scan.rises(), scan.propose()
    assert len(rises) == 30 and 0 < len(proposed) < 30
    spared = [rises[layer] for layer in range(30) if layer not in proposed]
    assert max(spared) == max(rises)


def test_the_model_is_untouched(default_model, real, uniform):
    """After all that was done with it."""
    from pruner_lib import load_model

    model, _ = default_model
    fresh, _ = load_model(device="cpu", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert model.config.to_dict() == fresh.config.to_dict()
