"""Take whole layers, or the attention or MLP inside them, out of a model that is ours to change."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pruner_lib.discovery.units import layer_of_unit
from pruner_lib.importance.calibration import untouched
from pruner_lib.importance.skipping import skipped
from pruner_lib.pruning.configuration import build_empty, saved_and_read
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.layer_config import unmark_config
from pruner_lib.pruning.sublayer_config import runs_without_weights, same_modules, say_sublayers
from pruner_lib.pruning.sublayers import (
    NoSublayer,
    cache_slots,
    layer_types,
    missing_sublayers,
    renumber,
    without_attention,
)


def drop_in_place(model: nn.Module, modules: Mapping[str, str]) -> nn.Module:
    """Remove units of depth from a model, in place, and make its configuration say so.

    Layers are renumbered: the key-value cache has one slot per layer that is left. Lists in the
    configuration that hold one entry per layer (``layer_types`` …) lose theirs.

    Args:
        model: a copy that nobody else holds.
        modules: unit (``"layers.5"``, ``"layers.5.mlp"``) to the path of its module.

    Returns:
        ``model``.

    Raises:
        PruningError: the configuration has no way to say which layers stay, or the model computes
            something else than with those units skipped.
    """
    expected = _probe(model, modules)
    sublayers = {unit: path for unit, path in modules.items() if unit.count(".") > 1}
    layers = {layer_of_unit(unit): path for unit, path in modules.items() if unit not in sublayers}
    said = is_built_by_its_configuration(model)
    path = _list_of_layers(modules)
    if sublayers:
        _replace(model, path, sublayers)
    if layers:
        remove_layers(model, layers)
    if missing_sublayers(model.get_submodule(path)):
        said = said and say_sublayers(model, path)
    if said and layers and not is_built_by_its_configuration(model):
        gone = ", ".join(map(str, sorted(layers)))
        raise PruningError(
            f"cannot drop layers {gone} of {type(model).__name__}: its configuration has no way to say "
            "which layers stay, so no checkpoint of it could be opened. The layers of this architecture "
            "differ by their number; drop others (the last ones, or a whole repeat of the pattern). The "
            "model is unchanged"
        )
    _check_same_function(model, expected)
    return model


def _probe(model: nn.Module, skip: Mapping[str, str]) -> torch.Tensor | None:
    """Logits of a few tokens with units skipped; None where there are no weights or no way to run."""
    gone = tuple(f"{path}." for path in skip.values())
    if any(parameter.is_meta for name, parameter in model.named_parameters() if not name.startswith(gone)):
        return None
    layers = [path for unit, path in skip.items() if unit.count(".") == 1]
    rest = [path for path in skip.values() if path not in layers]
    device = next(model.parameters()).device
    try:
        with untouched(model), torch.no_grad(), skipped(model, layers, rest):
            return model(input_ids=torch.arange(4, device=device)[None], use_cache=False).logits
    except Exception:  # a model that takes other inputs is not checked
        return None


def _check_same_function(model: nn.Module, expected: torch.Tensor | None) -> None:
    if expected is None:
        return
    found = _probe(model, {})
    if found is None:
        raise PruningError(
            f"cannot drop these layers of {type(model).__name__}: it cannot run without them, although it "
            "runs with them skipped. The model is unchanged"
        )
    scale = float(expected.abs().max()) or 1.0
    difference = float((found - expected).abs().max())
    if not difference <= 1e-2 * scale:
        raise PruningError(
            f"cannot drop these layers of {type(model).__name__}: without them the model differs from one "
            f"that skips them (logits by {difference:.2g}), so its code uses a layer's number for more than "
            "its place in the cache. The model is unchanged"
        )


def _list_of_layers(modules: Mapping[str, str]) -> str:
    unit, path = next(iter(modules.items()))
    parts = path.split(".")
    return ".".join(parts[: parts.index(str(layer_of_unit(unit)))])


def _replace(model: nn.Module, path: str, sublayers: Mapping[str, str]) -> None:
    values = _returned_values(model, list(sublayers.values()))
    holder = model.get_submodule(path)
    before = _slots(model, holder)
    for unit, place in sublayers.items():
        parent, _, name = place.rpartition(".")
        whole = model.get_submodule(place)
        empty = NoSublayer(whole, unit.rpartition(".")[2], values[place]).train(whole.training)
        setattr(model.get_submodule(parent), name, empty)
    for old, new, layer in zip(before, _slots(model, holder), holder.children(), strict=True):
        renumber(layer, old, new)


def _returned_values(model: nn.Module, paths: Sequence[str]) -> dict[str, int | None]:
    """How many values each module returns, seen in a run without weights."""
    from pruner_lib.discovery.tracing import meta_copy

    skeleton, found = meta_copy(model), {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[path] = len(out) if isinstance(out, tuple) else None

        return hook

    for path in paths:
        skeleton.get_submodule(path).register_forward_hook(watch(path))
    for _ in runs_without_weights(skeleton):
        if len(found) == len(paths):
            return found
    raise PruningError(
        f"{type(model).__name__} cannot run without weights, so no sublayer of it can be dropped"
    )


def remove_layers(model: nn.Module, layers: Mapping[int, str]) -> None:
    """Take layers (number to path) out, in place; those left and the configuration are renumbered."""
    parent = next(iter(layers.values())).rpartition(".")[0]
    holder = model.get_submodule(parent)
    before = _slots(model, holder)
    kept = [layer for layer in range(len(list(holder.children()))) if layer not in layers]
    left = [holder.get_submodule(str(layer)) for layer in kept]
    owner, _, name = parent.rpartition(".")
    shorter = type(holder)(left) if _is_list(holder) else type(holder)(*left)
    shorter.training = holder.training
    setattr(model.get_submodule(owner), name, shorter)
    seen: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            seen[id(config)] = config
    for config in seen.values():
        _keep_layers(config, kept)
    for old, new, layer in zip(kept, _slots(model, shorter), left, strict=True):
        renumber(layer, before[old], new)


def _slots(model: nn.Module, holder: nn.Module) -> list[int]:
    count = len(list(holder.children()))
    without = without_attention(missing_sublayers(holder))
    return cache_slots(layer_types(getattr(model, "config", None), count), without)


def _is_list(holder: nn.Module) -> bool:
    return isinstance(holder, nn.ModuleList)


def _keep_layers(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Make a configuration, in place, that of the layers ``kept``."""
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    overrides: dict[int, dict[str, Any]] = {}
    if text.is_heterogeneous:
        overrides = copy.deepcopy(text._heterogeneity_spec.per_layer_overrides)
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if not isinstance(value, list | tuple) or name.startswith("_") or name.endswith(_NOT_OF_LAYERS):
            continue
        if len(value) == count:
            vars(text)[name] = type(value)(value[layer] for layer in kept)
        elif name.endswith("_layers") and all(isinstance(v, int) and 0 <= v < count for v in value):
            vars(text)[name] = type(value)(kept.index(layer) for layer in value if layer in kept)
    vars(text)[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if overrides:
        _restore_overrides(text, {new: overrides.get(old, {}) for new, old in enumerate(kept)})


def _restore_overrides(config: PreTrainedConfig, overrides: dict[int, dict[str, Any]]) -> None:
    """Per-layer entries of the layers left; those that are now the same everywhere become global."""
    for entry in dict.fromkeys(entry for values in overrides.values() for entry in values if entry != "skip"):
        current = [values.get(entry, vars(config).get(entry)) for values in overrides.values()]
        if all(value == current[0] for value in current):
            vars(config)[entry] = current[0]
            for values in overrides.values():
                values.pop(entry, None)
    if any(overrides.values()):
        config.per_layer_config = {layer: values for layer, values in overrides.items() if values}
        return
    plain = copy.deepcopy(config)
    unmark_config(plain)
    if saved_and_read(plain) is not None:
        unmark_config(config)


def is_built_by_its_configuration(model: nn.Module) -> bool:
    """True when the configuration, saved and read back, builds modules of the same shapes and numbers."""
    if not isinstance(model, PreTrainedModel):
        return False
    config = saved_and_read(model.config)
    if config is None:
        return False
    config._attn_implementation_internal = model.config._attn_implementation_internal
    built = build_empty(type(model), config)
    return built is not None and same_modules(built, model)


_NOT_OF_LAYERS = ("token_id", "token_ids", "architectures")  # lists that may have as many entries by chance
