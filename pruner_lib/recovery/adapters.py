"""LoRA on a copy of a model: attach, save, attach again, merge; and the copy that full training changes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruner_lib.assets.files import replace_folder, temporary_folder, write_whole
from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.settings import RecoverySettings

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX = "base_model.model."  # what PEFT puts before every name
_BASE_FILE = "base_model.json"
_SAMPLES = 4  # weights of each adapted layer that are noted, to know the base model again


def linear_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of all linear layers but the output head, told by their type and not by their names.

    ``nn.Linear`` and GPT-2's ``Conv1D`` count.
    """
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    )


def require_no_adapter(model: nn.Module) -> None:
    """Refuse a model that already carries an adapter.

    Raises:
        RecoveryError: it does.
    """
    from peft import PeftModel

    found = [name for name, _ in _adapted_layers(model)]
    if found or isinstance(model, PeftModel):
        where = f" (in {len(found)} layers, the first is {found[0]})" if found else ""
        raise RecoveryError(
            f"the model already carries an adapter{where}; merge it with merge_adapter or take it off with "
            "unload(), then recover"
        )


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def chosen_modules(model: nn.Module, target: str | tuple[str, ...]) -> tuple[str, ...]:
    """Linear layers that a target names.

    Raises:
        RecoveryError: none does.
    """
    candidates = linear_modules(model)
    if target in ("all-linear", "all"):
        return candidates
    chosen = tuple(
        name for name in candidates if any(name == ending or name.endswith(f".{ending}") for ending in target)
    )
    if not chosen:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        raise RecoveryError(
            f"no linear layer matches target {target!r}; this model has layers named {', '.join(endings)}"
        )
    return chosen


def attach_lora(model: nn.Module, settings: RecoverySettings) -> PeftModel:
    """A model with LoRA on its linear layers; A is drawn from torch's random state.

    The frozen weights are not copied: they share their storage with the given model's, which nothing
    writes to before :func:`merge` makes new ones.

    Args:
        model: left as it is, bit for bit.
        settings: rank, alpha, dropout and target are read.

    Raises:
        RecoveryError: no module matches the target, or one that does is shared by several parents.
    """
    from peft import LoraConfig, get_peft_model

    chosen = chosen_modules(model, settings.target)
    _require_unshared(model, (model.get_submodule(name) for name in chosen))
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(chosen), task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(_sharing_copy(model), config)


def _require_unshared(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Refuse layers whose weight acts at several places: PEFT adapts one of them, a merge changes all."""
    places: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():  # each parent once: what lies in it is adapted in place
        for key, child in parent._modules.items():
            if child is not None and (weight := child._parameters.get("weight")) is not None:
                places.setdefault(id(weight), []).append(f"{prefix}.{key}".removeprefix(_PREFIX))
    for layer in layers:
        names = places.get(id(layer.weight), [])
        if len(names) > 1:
            raise RecoveryError(
                f"{' and '.join(names)} share one weight, and an adapter would act at one of these places "
                "but be merged into all; give each its own copy of the layer (copy.deepcopy), name others "
                'as target, or train the weights themselves with method="full"'
            )


def _sharing_copy(model: nn.Module) -> Any:
    """New modules and new, frozen parameters over the same storage."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def full_copy(model: nn.Module, settings: RecoverySettings) -> nn.Module:
    """A copy whose own weights are trained: those of the target, or all.

    Half-precision weights are held in float32 while they learn, as small updates would vanish.

    Raises:
        RecoveryError: no module matches the target.
    """
    trained = copy.deepcopy(model)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters()):
        trained.float()
    if settings.target == "all":
        return trained.requires_grad_(True)
    trained.requires_grad_(False)
    for name in chosen_modules(trained, settings.target):
        for parameter in trained.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    return trained


def attach_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Put a saved adapter on the model it was trained for.

    Args:
        model: the pruned model, in any precision; left as it is.
        folder: what ``recover(…, output_dir=…)`` left in ``adapter``.

    Returns:
        PEFT's model over a copy; :func:`merge_adapter` makes an ordinary model of it.

    Raises:
        RecoveryError: no adapter there, one of another model, or one on a layer that several parents share.

    Example:
        >>> merge_adapter(attach_adapter(load_pruned("pruned"), "run/adapter"))
    """
    from peft import PeftModel

    require_no_adapter(model)
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise RecoveryError(
            f"no adapter in {folder}: adapter_config.json is missing; give the folder 'adapter' that "
            "recover left in its output_dir"
        )
    _require_same_base(model, folder)
    copied = _sharing_copy(model)
    try:
        adapted = PeftModel.from_pretrained(copied, folder)
    except (RuntimeError, ValueError, OSError) as error:
        raise RecoveryError(f"the adapter in {folder} does not fit this model: {error}") from error
    _require_unshared(adapted, (layer.get_base_layer() for _, layer in _adapted_layers(adapted)))
    return adapted.eval()


def merge_adapter(adapted: PeftModel) -> nn.Module:
    """W + (alpha / rank) B A in every adapted layer, as an ordinary model; merging again changes nothing.

    Of several adapters the active ones are merged, each with its own alpha and rank. The sum is taken in
    float32 or wider and rounded once. The weights that ``adapted`` was made over are not written to; the
    result shares no memory with them. Where PEFT's own ``merge_adapter()`` has already written into them,
    they are taken as they are: that is what ``adapted`` computes with.

    Raises:
        RecoveryError: not PEFT's model, another kind of adapter than plain LoRA (DoRA, ``lora_bias``, trained
            copies of modules), or a layer that several parents share.
    """
    layers = _plain_lora_layers(adapted)
    with torch.no_grad():
        merged = {name: _merged_weight(layer) for name, layer in layers}
    model: nn.Module = adapted.unload() if merged else adapted.get_base_model()
    by_name = {name.removeprefix(_PREFIX): weight for name, weight in merged.items()}
    fresh: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value = by_name[name] if key == "weight" and name in by_name else None
            if merged and id(parameter) not in fresh:
                new = parameter.detach().clone() if value is None else value
                fresh[id(parameter)] = nn.Parameter(new)
            module._parameters[key] = fresh.get(id(parameter), parameter)
    return model


def _plain_lora_layers(adapted: Any) -> list[tuple[str, Any]]:
    """The adapted layers, all of which W + (alpha / rank) B A says whole."""
    from peft import PeftModel
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(adapted, PeftModel):
        raise RecoveryError(
            f"merge_adapter takes PEFT's model, what attach_adapter returns, not a {type(adapted).__name__}"
        )
    layers = _adapted_layers(adapted)
    faults = {name: fault for name, layer in layers if (fault := _beyond_lora(layer)) is not None}
    faults |= {
        name: "a trained copy of a whole module or of some tokens"
        for name, module in adapted.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    if faults:
        name, fault = next(iter(faults.items()))
        raise RecoveryError(
            f"{name.removeprefix(_PREFIX)} has {fault}, and merge_adapter merges plain LoRA alone; "
            "PEFT merges it itself: adapted.merge_and_unload()"
        )
    _require_unshared(adapted, (layer.get_base_layer() for _, layer in layers))
    return layers


def _beyond_lora(layer: Any) -> str | None:
    """What a layer's active adapters do beside adding (alpha / rank) B A to a plain weight."""
    from peft.tuners.lora import layer as lora

    if not isinstance(layer, (lora.Linear, lora.Embedding, lora._ConvNd)):
        return f"an adapter of the kind {type(layer).__module__}.{type(layer).__name__}"
    for name in _acting(layer):
        if layer.use_dora.get(name, False):
            return "DoRA"
        if (variant := layer.lora_variant.get(name)) is not None:
            return f"the variant {getattr(variant, '__name__', type(variant).__name__)} of LoRA"
        if layer.lora_bias.get(name, False):
            return "lora_bias=True"
    return None


def _acting(layer: Any) -> list[str]:
    """Adapters that the layer computes with."""
    known = {*layer.lora_A, *layer.lora_embedding_A}
    return [name for name in layer.active_adapters if name in known]


def _merged_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    # A layer that PEFT merged in place computes with its weight alone, whatever is active.
    updates = [] if layer.merged else [layer.get_delta_weight(name) for name in _acting(layer)]
    return _sum(weight, *updates)


def _sum(weight: Tensor, *updates: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.detach().to(wide, copy=True)
    for update in updates:
        total += update.to(wide)
    return total.to(weight.dtype)


def finish(trained: nn.Module, original: nn.Module) -> nn.Module:
    """An ordinary model out of what was trained: merged, with the original's flags, types and device."""
    from peft import PeftModel

    model: nn.Module = merge_adapter(trained) if isinstance(trained, PeftModel) else trained
    before = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(before[name].device, before[name].dtype)
        parameter.requires_grad_(before[name].requires_grad)
        parameter.grad = None
    buffers = dict(original.named_buffers())
    modules = dict(original.named_modules())
    for name, module in model.named_modules():
        module.training = modules[name].training
        for key in module._buffers:
            if (given := buffers.get(f"{name}.{key}".lstrip("."))) is not None:
                module._buffers[key] = given.clone()
    _restore_config(model, original)
    return model


def _restore_config(merged: nn.Module, original: nn.Module) -> None:
    """The trainer turns ``use_cache`` off while it trains; an interrupted one leaves it off."""
    wanted = getattr(getattr(original, "config", None), "use_cache", None)
    config: Any = getattr(merged, "config", None)
    if wanted is not None and config.use_cache != wanted:
        config.use_cache = wanted


def save_adapter(adapted: PeftModel, folder: str | os.PathLike[str]) -> Path:
    """Save the adapter alone as ``folder/adapter``, replacing an older one only when the new one is whole.

    Beside PEFT's own files it holds a few numbers of the base model's weights, by which
    :func:`attach_adapter` knows that model again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "adapter"
    with temporary_folder(target) as scratch:
        part = scratch / "adapter"
        adapted.save_pretrained(str(part))
        layers = {
            name.removeprefix(_PREFIX): layer.get_base_layer().weight
            for name, layer in _adapted_layers(adapted)
        }
        write_whole(part / _BASE_FILE, json.dumps({n: _describe(w) for n, w in layers.items()}, indent=1))
        replace_folder(part, target)
    return target


def _describe(weight: Tensor) -> dict[str, Any]:
    flat = weight.detach().flatten()
    sample: Sequence[float] = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float().tolist()
    return {"shape": list(weight.shape), "sample": sample}


def _require_same_base(model: nn.Module, folder: Path) -> None:
    """Shapes must agree, and the noted weights up to the rounding of half precision."""
    note = folder / _BASE_FILE
    if not note.is_file():
        return  # an adapter that PEFT alone saved
    modules = dict(model.named_modules())
    expected = json.loads(note.read_text(encoding="utf-8"))
    found: dict[str, Any] = {name: getattr(modules.get(name), "weight", None) for name in expected}
    problem = next((text for name in expected if (text := _misfit(name, found[name], expected[name]))), None)
    if problem is None:
        noted = torch.tensor([value for entry in expected.values() for value in entry["sample"]])
        here = torch.tensor([value for name in expected for value in _describe(found[name])["sample"]])
        if not torch.allclose(here, noted, rtol=1e-2, atol=1e-6):
            problem = "the shapes agree, the weights do not"
    if problem:
        raise RecoveryError(
            f"the adapter in {folder} is of another model: {problem}; attach it to the pruned model "
            "that was given to recover"
        )


def _misfit(name: str, weight: Tensor | None, expected: dict[str, Any]) -> str | None:
    shape = "no such layer" if weight is None else list(weight.shape)
    return None if shape == expected["shape"] else f"{name} was {expected['shape']} there, here it is {shape}"
