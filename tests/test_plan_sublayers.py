"""Models without the attention or the MLP of some layers: saved, opened, refused without this library."""

import json
import subprocess
import sys

import pytest
import torch
import zoo
from test_surgery import ARCHITECTURES, cut, generated, logits, tiny, tokens
from transformers import AutoModelForCausalLM

from pruner_lib.checkpoint import CheckpointError, compatibility, load_pruned, save_pruned
from pruner_lib.discovery import discover
from pruner_lib.discovery.units import depth_units
from pruner_lib.pruning import PruningPlan, prune, prune_layers
from pruner_lib.pruning.layer_config import MARK, is_marked
from pruner_lib.pruning.sublayers import NoSublayer, cache_slots

GONE = ["layers.0.attention", "layers.2.mlp"]


def thinner(name="llama", dropped=(*GONE,), removal=None):
    model = tiny(name)
    dependencies = discover(model)
    dropped = [unit for unit in dropped if unit in depth_units(dependencies)]
    return prune(model, PruningPlan.from_removal(dependencies, removal or {}, dropped=dropped))


def opened(model, folder):
    save_pruned(model, folder)
    return load_pruned(folder)


def same(again, model):
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)  # rotary tables in float32
    expected = generated(again, use_cache=False)
    assert torch.equal(generated(again, use_cache=True), expected)
    assert torch.equal(generated(again, cache_implementation="static", disable_compile=True), expected)
    numbers = {name: vars(module).get("layer_idx") for name, module in model.named_modules()}
    assert {name: vars(module).get("layer_idx") for name, module in again.named_modules()} == numbers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_opened_again(name, tmp_path):
    model = thinner(name)
    assert is_marked(model.config) and model.config.per_layer_config[0].skip
    same(opened(model, tmp_path / "thin"), model)


def test_plain_transformers_raises(tmp_path):
    """A process that never heard of this library must not build whole layers with random weights."""
    folders = [str(tmp_path / kind) for kind in ("mlp", "attention")]
    for folder, kind in zip(folders, ("mlp", "attention"), strict=True):
        save_pruned(thinner(dropped=[f"layers.1.{kind}"]), folder)
    code = (
        "import sys; sys.modules['pruner_lib'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"for folder in {folders!r}:\n"
        "    try: AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except Exception as error: print(error)\n"
        "    else: print('opened')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("is a per-layer attribute" in line for line in said), done.stderr[-500:]


def test_depth_and_width_together(tmp_path):
    model = thinner(dropped=["layers.1", *GONE], removal={"layers.2.attention_head": [0]})
    assert [child.layer_idx for child in (model.model.layers[1].self_attn,)] == [0], "the only slot in use"
    same(opened(model, tmp_path / "thin"), model)


@pytest.mark.parametrize("drops", [(["layers.0.attention"], ["layers.1"]), (GONE, [0]), (GONE, [1])])
def test_dropped_again(drops, tmp_path):
    """Dropping twice is dropping both at once, whatever the first did to the cache's slots."""
    first, second = drops
    model = prune_layers(prune_layers(tiny(), first), second)
    whole = [f"layers.{unit}" if isinstance(unit, int) else unit for unit in second]
    once = thinner(dropped=[*first, *whole])
    assert torch.equal(logits(model), logits(once))
    same(opened(model, tmp_path / "thin"), once)


def test_pruned_again(tmp_path):
    model = thinner()
    dependencies = discover(model)
    removal = {"layers.0.mlp_neuron": [1, 2], "layers.1.mlp_neuron": [3, 4], "layers.2.attention_head": [1]}
    again = prune(model, PruningPlan.from_removal(dependencies, removal))
    expected = logits(dependencies.zero(model, removal))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-9)
    same(opened(again, tmp_path / "thin"), again)


def test_one_width_in_every_layer_that_has_it_still_needs_the_library(tmp_path):
    """With the same neurons gone from all MLPs that are left, the mark and the gaps stay."""
    removal = {f"layers.{i}.mlp_neuron": [0, 1] for i in range(3)}
    model = thinner(dropped=["layers.1.mlp"], removal=removal)
    assert is_marked(model.config)
    same(opened(model, tmp_path / "thin"), model)


def test_every_mlp_gone(tmp_path):
    model = thinner(dropped=[f"layers.{i}.mlp" for i in range(3)])
    assert not any(".mlp." in name for name, _ in model.named_parameters())
    same(opened(model, tmp_path / "thin"), model)
    left = prune_layers(model, [0, 1])
    same(opened(left, tmp_path / "left"), left)


def test_it_trains_and_takes_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    again = opened(thinner(), tmp_path / "thin")
    expected = logits(again)
    adapted = get_peft_model(again, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-12)
    adapted(tokens(), labels=tokens()).loss.backward()
    trained = {n.split(".lora_")[0] for n, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 4, "two attentions and two MLPs are left"


def test_it_compiles_whole():
    model = thinner().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens(), use_cache=False).logits, logits(model), rtol=0, atol=1e-9
        )


def test_what_opens_it():
    answers = compatibility(thinner())
    assert not answers["transformers"].opens and answers["transformers with pruner_lib"].opens
    assert "without" in answers["transformers"].why


def test_a_newer_mark_is_refused(tmp_path):
    save_pruned(thinner(), tmp_path / "thin")
    file = tmp_path / "thin" / "config.json"
    config = json.loads(file.read_text())
    config[MARK]["schema"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"newer kind of checkpoint.*install a newer one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "thin")


def test_what_cannot_be_said_works_in_memory_all_the_same(tmp_path):
    model = cut(tiny("gpt2"), {"hidden_channel": [0, 1]})  # GPT-2's configuration has no word for it
    thinner = prune_layers(model, ["layers.1.mlp"])
    assert isinstance(thinner.transformer.h[1].mlp, NoSublayer) and not is_marked(thinner.config)
    with pytest.raises(CheckpointError, match="configuration has no way to say"):
        save_pruned(thinner, tmp_path / "thin")
    assert not (tmp_path / "thin").exists()


def test_slots_by_hand():
    assert cache_slots(["", "", "", ""], {1}) == [0, 1, 1, 2]
    assert cache_slots(["full", "sliding", "full", "sliding"], {0}) == [0, 1, 0, 3]
    assert cache_slots(["full", "sliding", "full", "sliding"], {1, 2}) == [0, 1, 2, 1]


@pytest.mark.parametrize("unit", ["layers.0.attention", "layers.1.mlp"])
def test_an_entry_that_its_code_asks_of_the_whole_model_is_no_way_to_say_it(unit):
    """MPT reads its longest sequence off the whole configuration: set for one layer, it cannot run."""
    thinner = prune_layers(zoo.tiny("mpt"), [unit])
    assert torch.isfinite(logits(thinner)).all()
