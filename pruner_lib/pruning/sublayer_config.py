"""Write into a configuration that some layers have no attention or no MLP."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pruner_lib.pruning.configuration import build_empty, saved_and_read, shapes_of
from pruner_lib.pruning.layer_config import IMPLEMENTATIONS, MARK, mark_config, mark_sublayers
from pruner_lib.pruning.sublayers import NoSublayer, missing_sublayers

Gone = Mapping[int, Mapping[str, NoSublayer]]
Overrides = dict[int | str, dict[str, Any]]
_LIKELY = {"mlp": ("inter", "inner", "ffn", "mlp"), "attention": ("head",)}


def say_sublayers(model: nn.Module, path: str) -> bool:
    """Make a model's configuration say which of its sublayers are gone, in place.

    transformers knows ``skip`` in ``per_layer_config``, but builds whole layers all the same, and fills
    them with random numbers when the weights are not there. So ``skip`` never stands alone: the layer
    gets another width besides (``intermediate_size`` of an MLP that is not there), which makes plain
    transformers raise. Both are tried before they are kept: with this library the configuration builds
    exactly this model, without it none.

    Args:
        model: with ``NoSublayer`` in the places of what is gone.
        path: of its list of layers.

    Returns:
        False when there is no way to say it; the configuration is then what it was.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if model.config.get_text_config(decoder=True) is not model.config:
        return False
    gone = missing_sublayers(model.get_submodule(path))
    described = {(name, *child.described().items()) for g in gone.values() for name, child in g.items()}
    if len(described) != len({name for name, *_ in described}):
        return False  # one name means two kinds of sublayer in different layers
    base, overrides = _without_skips(model.config)
    for layer, children in gone.items():
        overrides.setdefault(layer, {})["skip"] = sorted(children)
    for extra in _other_widths(base, gone):
        config = _told(base, overrides, extra, gone)
        if config is None:
            continue
        built = build_empty(type(model), _like(config, model.config))
        if built is None or not same_modules(built, model) or _opens_plainly(model, config):
            continue
        # A value of one layer may be asked of the whole model, which then cannot run.
        if next(runs_without_weights(built), False):
            _adopt(model, built)
            return True
    return False


def _without_skips(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Overrides]:
    """The configuration with one value for all layers, and the overrides of single layers."""
    base = copy.deepcopy(config)
    overrides: Overrides = {}
    if base.is_heterogeneous:
        overrides = copy.deepcopy(base._heterogeneity_spec.per_layer_overrides)
        base.per_layer_config = None
    for values in overrides.values():
        values.pop("skip", None)
    return base, overrides


def _other_widths(config: PreTrainedConfig, gone: Gone) -> Iterator[Overrides]:
    """Entries to set beside ``skip``, likeliest first; none, where the layers' widths differ anyway."""
    yield {}
    for kind, words in _LIKELY.items():
        layers = [n for n, g in gone.items() if any(child.kind == kind for child in g.values())]
        likely = {name: any(word in name for word in words) for name in vars(config) if name[0] != "_"}
        for name in sorted(likely, key=lambda name: not likely[name]):
            value = vars(config)[name]
            number = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if layers and (number or (value is None and likely[name])):  # GPT-2 computes its n_inner
                yield {layer: {name: 2 if value == 1 else 1} for layer in layers}


def _told(
    base: PreTrainedConfig, overrides: Overrides, extra: Overrides, gone: Gone
) -> PreTrainedConfig | None:
    """A configuration with those overrides as it is after saving and reading; None when it is refused."""
    config = copy.deepcopy(base)
    mark_config(config)
    mark_sublayers(config, {name: child.described() for g in gone.values() for name, child in g.items()})
    together = {
        layer: {**overrides.get(layer, {}), **extra.get(layer, {})}
        for layer in dict.fromkeys((*overrides, *extra))
    }
    try:
        config.per_layer_config = together
    except Exception:  # validators raise errors of many kinds
        return None
    return saved_and_read(config)


def _like(config: PreTrainedConfig, other: PreTrainedConfig) -> PreTrainedConfig:
    for chosen in IMPLEMENTATIONS:
        setattr(config, chosen, getattr(other, chosen, None))
    return config


def _opens_plainly(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """True when transformers alone would build a model: whole layers with random weights."""
    plain = copy.deepcopy(config)
    vars(plain).pop(MARK, None)
    read = saved_and_read(plain)
    return read is not None and build_empty(type(model), read) is not None


def runs_without_weights(empty: nn.Module) -> Iterator[bool]:
    """Run a meta model in each way that a decoder is called; true after each that goes through."""
    from pruner_lib.discovery.tracing import default_inputs

    for inputs in default_inputs(empty):
        try:
            with torch.no_grad(), torch.device("meta"):
                empty(**inputs)
        except Exception:  # the model's own code fails in its own way; the next call may do
            continue
        yield True


def same_modules(built: nn.Module, model: nn.Module) -> bool:
    """True when two models have modules of the same names, shapes and numbers."""
    if shapes_of(built) != shapes_of(model):
        return False
    others = dict(built.named_modules())
    return all(name in others and _numbers(m) == _numbers(others[name]) for name, m in model.named_modules())


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module keeps, which its forward may depend on."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and name not in _STATE
    }


_STATE = ("training", "gradient_checkpointing", "is_gradient_checkpointing", "name_or_path")


def _adopt(model: PreTrainedModel, built: nn.Module) -> None:
    """Give every module the configuration that it has in the built model, in place."""
    others = dict(built.named_modules())
    for name, module in model.named_modules():
        config = vars(others[name]).get("config") if name in others else None
        if isinstance(config, PreTrainedConfig) and isinstance(vars(module).get("config"), PreTrainedConfig):
            module.config = config
