"""Let transformers build models whose layers differ in width.

transformers stores and reads back ``config.per_layer_config`` (layer -> overrides), but most of its
modelling code still reads one width for all layers, and raises when the width is per layer.
:func:`enable_per_layer_config` hands layer ``i`` the configuration ``config.per_layer_config[i]``
when it is built. It acts only on configurations that carry this library's mark; without the import
of ``pruner_lib`` such a checkpoint does not open, it raises.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError
from transformers.modeling_layers import GradientCheckpointingLayer

from pruner_lib.pruning.sublayers import NoSublayer, cache_slots, layer_types, renumber

MARK = "pruner_lib"
SCHEMA = 2  # of the mark; 1 has no "sublayers"
# How attention and experts are computed: transformers' choices for a model, kept in every configuration.
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")
_WRAPPED = "_wrapped_by_pruner_lib"
_LAYER_ARGUMENTS = ("layer_idx", "layer_id", "layer_number")


def is_marked(config: Any) -> bool:
    """True when a configuration was written by this library and needs it to open."""
    return MARK in getattr(config, "__dict__", {})


def mark_config(config: PreTrainedConfig) -> None:
    """Mark a configuration, in place, as one that opens only where ``pruner_lib`` is imported."""
    if not sublayers_of(config):
        setattr(config, MARK, {"needs": "import pruner_lib", "schema": 1})
    _relax_validation(type(config))


def mark_sublayers(config: PreTrainedConfig, sublayers: Mapping[str, Mapping[str, Any]]) -> None:
    """Write into the mark, in place, what is gone from the layers that ``skip`` it, by name in the layer."""
    setattr(config, MARK, {"needs": "import pruner_lib", "schema": SCHEMA, "sublayers": dict(sublayers)})


def unmark_config(config: PreTrainedConfig) -> None:
    """Take the mark off, in place, unless sublayers are gone, which only this library understands."""
    if not sublayers_of(config):
        vars(config).pop(MARK, None)


def sublayers_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """What the mark says of sublayers that are gone; empty without a mark."""
    return vars(config).get(MARK, {}).get("sublayers", {})


def enable_per_layer_config() -> None:
    """Make transformers build marked configurations layer by layer; calling it again does nothing.

    Models whose configuration does not carry the mark are built exactly as before.
    """
    if getattr(PreTrainedModel.__init__, _WRAPPED, False):
        return
    _patch(PreTrainedModel, "__init__", _model_init)
    _patch(PreTrainedModel, "set_attn_implementation", _set_everywhere)
    _patch(PreTrainedModel, "set_experts_implementation", _set_everywhere)
    original = vars(PreTrainedConfig)["from_dict"].__func__

    @functools.wraps(original)
    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if MARK in config_dict:
            _relax_validation(cls)
        return original(cls, config_dict, **kwargs)

    setattr(PreTrainedConfig, "from_dict", classmethod(from_dict))  # noqa: B010


def _patch(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _WRAPPED, True)
    setattr(owner, name, replacement)


def _model_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: PreTrainedModel, config: Any, *inputs: Any, **kwargs: Any) -> None:
        if is_marked(config):
            _wrap_layer_classes(type(self))
        original(self, config, *inputs, **kwargs)

    return __init__


def _set_everywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_implementation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if is_marked(self.config):
            # Each layer holds its own copy of the configuration, which must not keep the old choice.
            for module in self.modules():
                config = module.__dict__.get("config")
                if config is not None and is_marked(config):
                    for chosen in IMPLEMENTATIONS:
                        setattr(config, chosen, getattr(self.config, chosen, None))
        return result

    return set_implementation


def _wrap_layer_classes(model_class: type) -> None:
    """Wrap the constructors of the decoder layers that live beside a model class, once."""
    for base in model_class.__mro__:
        for layer_class in list(vars(sys.modules.get(base.__module__, object)).values()):
            if (
                isinstance(layer_class, type)
                and issubclass(layer_class, GradientCheckpointingLayer)
                and layer_class is not GradientCheckpointingLayer
                and not getattr(layer_class.__init__, _WRAPPED, False)
                and {"config", *_LAYER_ARGUMENTS} & set(inspect.signature(layer_class.__init__).parameters)
            ):
                _patch(layer_class, "__init__", _layer_init)


def _layer_init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments.get("config")
        differs = config is not None and is_marked(config) and config.is_heterogeneous
        if config is not None and differs:
            layers = [bound.arguments[name] for name in _LAYER_ARGUMENTS if name in bound.arguments]
            if not layers or layers[0] is None:
                raise RuntimeError(
                    f"{type(self).__name__} was built without its layer number, so the widths of this layer "
                    "are unknown; this architecture cannot hold layers of different widths"
                )
            bound.arguments["config"] = config.per_layer_config[layers[0]]
        original(*bound.args, **bound.kwargs)
        if config is not None and differs:
            _take_out(self, config, layers[0])

    return __init__


def _take_out(layer: torch.nn.Module, config: PreTrainedConfig, number: int) -> None:
    """Take the sublayers that a layer skips out of it, in place, and give it its slot of the cache."""
    described = sublayers_of(config)
    skips = {n: v["skip"] for n, v in config._heterogeneity_spec.per_layer_overrides.items() if "skip" in v}
    unknown = {name for names in skips.values() for name in names} - set(described)
    if unknown or config.__dict__[MARK].get("schema", 1) > SCHEMA:
        found = f"the sublayers {', '.join(sorted(unknown))}" if unknown else "a newer kind of checkpoint"
        raise RuntimeError(f"this version of pruner_lib does not understand {found}; install a newer one")
    for name in skips.get(number, ()):
        gone = described[name]
        setattr(layer, name, NoSublayer(getattr(layer, name), gone["kind"], gone["values"]))
    attentions = {name for name, gone in described.items() if gone["kind"] == "attention"}
    without = {n for n, names in skips.items() if attentions & set(names)}
    if without:
        renumber(layer, number, cache_slots(layer_types(config, config.num_hidden_layers), without)[number])


def _relax_validation(config_class: type) -> None:
    """Let marked configurations pass checks that only a model of one width has to meet.

    Llama's wants ``hidden_size`` to be a multiple of the head count even where ``head_dim`` is
    given; others read one width for all layers.
    """
    validators = config_class.__dict__.get("__class_validators__")
    if validators is None:
        return
    for position, validator in enumerate(validators):
        if not getattr(validator, _WRAPPED, False):
            validators[position] = _lenient_when_marked(validator)


def _lenient_when_marked(validator: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(validator)
    def validate(config: Any) -> None:
        if not is_marked(config):
            validator(config)
        elif validator.__name__ != "validate_architecture":
            with contextlib.suppress(AmbiguousGlobalPerLayerAttributeError):
                validator(config)

    setattr(validate, _WRAPPED, True)
    return validate
