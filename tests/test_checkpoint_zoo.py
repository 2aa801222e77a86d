"""Uniform plans open in a process that has never heard of this library, for every architecture of the zoo."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from architectures import one_each
from test_checkpoint import tiny as make
from torch import nn
from zoo import CONFIGURATIONS, tiny

from pruner_lib.checkpoint import CheckpointError, compatibility, save_pruned
from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.pruning import PruningError, PruningPlan, prune

EVERYTHING = ("attention_head", "mlp_neuron", "hidden_channel")
# What the configuration of an architecture has an entry for.
SAYS = {
    **dict.fromkeys(("llama", "llama_mha", "mistral", "qwen2", "qwen3", "phi"), EVERYTHING),
    **dict.fromkeys(("phi3", "glm", "glm4", "olmo2", "starcoder2", "granite"), EVERYTHING),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), ("attention_head", "mlp_neuron")),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "gpt_bigcode"), ("mlp_neuron",)),
    **dict.fromkeys(("falcon_old", "falcon_new", "stablelm"), ("mlp_neuron",)),
}
SAYS_NOTHING = ("bloom", "mpt")  # the MLP is four times the residual width, by their code
VARYING = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "olmo2")
# What is less often cut, where the configuration states it.
RARER = (("llama", "query_head"), ("qwen3", "query_head"), ("mixtral", "expert"))
SHORTER = ("llama", "gemma2")  # without a whole layer
TOKENS = torch.arange(3, 15).reshape(2, 6)

OPEN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
found, raised = {}, {}
for folder in json.loads(sys.stdin.read()):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found[folder] = model(input_ids=torch.arange(3, 15).reshape(2, 6)).logits
    except Exception as error:
        raised[folder] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[1])
print(json.dumps([raised, any(name.split(".")[0] == "pruner_lib" for name in sys.modules)]))
"""


def removal(
    dependencies: DependencyMap,
    kinds: tuple[str, ...],
    layers: tuple[int, ...] | None,
    groups: tuple[int, ...] = (1,),
) -> dict:
    """The same groups of each family that has more."""
    return {
        family.name: list(groups)
        for kind in kinds
        for family in dependencies.select(kind=kind)
        if family.size > max(groups) and (layers is None or family.layer in layers)
    }


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@dataclass
class Saved:
    """Logits before saving and after opening, by folder."""

    before: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    imported: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    library_seen: bool = False


def opened_elsewhere(folders: list[str], place: Path, preamble: str) -> tuple[dict, dict, bool]:
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", preamble + OPEN, str(place)], input=json.dumps(folders), capture_output=True,
        text=True, timeout=300, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    raised, seen = json.loads(done.stdout.splitlines()[-1])
    return torch.load(place), raised, seen


def save_and_open(place: Path, names: Iterable[str], *, others: bool) -> Saved:
    """Save plans of some architectures, and open all of them in two processes.

    Args:
        place: an empty folder.
        names: of ``SAYS``.
        others: also try those of which nothing is listed.
    """
    result = Saved()

    def keep(folder: str, model: nn.Module, chosen: dict, dropped: tuple[str, ...] = ()) -> None:
        pruned = prune(model, PruningPlan.from_removal(discover(model), chosen, dropped=dropped))
        save_pruned(pruned, place / folder)
        result.before[folder] = logits(pruned)

    for name in names:
        model = tiny(name, torch.float32)
        dependencies = discover(model)
        keep(f"{name}-uniform", model, removal(dependencies, SAYS[name], None))
        if name in VARYING:
            keep(f"{name}-varying", model, removal(dependencies, SAYS[name][:2], (0,)))
    for name, kind in RARER if not others else ():
        model = tiny(name, torch.float32)
        chosen = {family.name: one_each(family) for family in discover(model).select(kind=kind)}
        keep(f"{name}-{kind}", model, chosen)
    for name in SHORTER if not others else ():
        keep(f"{name}-depth", tiny(name, torch.float32), {}, ("layers.0",))
    for name in sorted(set(CONFIGURATIONS) - {*SAYS, *SAYS_NOTHING}) if others else ():
        model = tiny(name, torch.float32)
        # Four at a time: torch multiplies experts only where a row takes a multiple of 16 bytes.
        chosen = removal(discover(model), ("mlp_neuron",), None, (0, 1, 2, 3))
        with contextlib.suppress(CheckpointError, PruningError):  # it cannot be said: not tried
            keep(f"{name}-tried", model, chosen)
    biased = make("llama", num_key_value_heads=4, attention_bias=True)
    keep("llama-biased-varying", biased, {f"layers.{i}.attention_head": [0] for i in range(3)})
    folders = [str(place / folder) for folder in result.before]
    plain, refused, result.library_seen = opened_elsewhere(folders, place / "plain.pt", "")
    varying = [folder for folder in folders if folder.endswith("varying") or folder in refused]
    imported, failed, _ = opened_elsewhere(varying, place / "imported.pt", "import pruner_lib\n")
    assert not failed, failed
    result.plain = {Path(folder).name: found for folder, found in plain.items()}
    result.refused = {Path(folder).name: why for folder, why in refused.items()}
    result.imported = {Path(folder).name: found for folder, found in imported.items()}
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Architectures of every layout: separate, fused and grouped projections, Conv1D, norms over heads."""
    return save_and_open(tmp_path_factory.mktemp("zoo"), VARYING, others=False)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """All the others."""
    names = [name for name in SAYS if name not in VARYING]
    return save_and_open(tmp_path_factory.mktemp("rest"), names, others=True)


def check_plain(saved: Saved, folder: str) -> None:
    assert not saved.library_seen
    assert folder not in saved.refused, saved.refused.get(folder)
    assert torch.equal(saved.plain[folder], saved.before[folder])


@pytest.mark.parametrize("name", VARYING)
def test_a_uniform_plan_opens_where_the_library_was_never_imported(saved: Saved, name: str) -> None:
    check_plain(saved, f"{name}-uniform")


@pytest.mark.parametrize("folder", [*("-".join(case) for case in RARER), *(f"{n}-depth" for n in SHORTER)])
def test_query_heads_experts_and_layers_less_open_so(saved: Saved, folder: str) -> None:
    check_plain(saved, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAYS if name not in VARYING])
def test_a_uniform_plan_of_every_other_architecture_opens_so(rest: Saved, name: str) -> None:
    check_plain(rest, f"{name}-uniform")


@pytest.mark.parametrize("name", VARYING)
def test_layers_that_differ_open_after_the_import_and_raise_without(saved: Saved, name: str) -> None:
    folder = f"{name}-varying"
    assert torch.equal(saved.imported[folder], saved.before[folder])
    assert "per-layer" in saved.refused[folder]
    assert folder not in saved.plain


def test_a_head_count_that_the_configuration_refuses_opens_after_the_import(saved: Saved) -> None:
    folder = "llama-biased-varying"  # 3 heads of 4; with biases mistral cannot stand in
    assert torch.equal(saved.imported[folder], saved.before[folder])
    assert "not a multiple" in saved.refused[folder]


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_an_architecture_whose_configuration_cannot_say_it_is_refused(name: str, tmp_path: Path) -> None:
    model = tiny(name, torch.float32)
    dependencies = discover(model)
    chosen = removal(dependencies, ("mlp_neuron",), None)
    pruned = prune(model, PruningPlan.from_removal(dependencies, chosen))
    with pytest.raises(CheckpointError, match="no way to say the new sizes"):
        save_pruned(pruned, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    answer = compatibility(pruned)["transformers"]
    assert answer.verdict == "no" and "no way to say" in answer.why


@pytest.mark.slow
def test_what_saves_opens_in_architectures_that_are_not_listed(rest: Saved) -> None:
    assert {*SAYS, *SAYS_NOTHING} <= set(CONFIGURATIONS)
    others = {folder: found for folder, found in rest.before.items() if folder.endswith("-tried")}
    opened = {**rest.imported, **rest.plain}
    wrong = {
        folder: rest.refused.get(folder, "other logits")
        for folder, found in others.items()
        if folder not in opened or not torch.allclose(opened[folder], found, atol=1e-5)
    }
    assert wrong == {}
    # Only where some layers have no dense MLP does the same share of all neurons differ between layers.
    needs_import = {folder.removesuffix("-tried") for folder in set(others) - set(rest.plain)}
    assert all(name.startswith("deepseek") for name in needs_import)
