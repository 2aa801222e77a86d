"""Find the configuration that builds a model of exactly the cut shapes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pruner_lib.pruning.layer_config import (
    IMPLEMENTATIONS,
    enable_per_layer_config,
    mark_config,
    unmark_config,
)
from pruner_lib.pruning.ratios import Profile, profiles

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan

Shapes = dict[str, tuple[int, ...]]
Widths = dict[str, dict[int, int]]  # configuration entry -> layer -> value
_MAX_ENTRIES = 3  # entries that one profile may change together; two (heads and KV heads) is the usual number
_MAX_BUILDS = 100  # models built before giving up; the widest search of the zoo that finds one takes 59
_MAX_REFUSALS = 6  # configurations of the right shapes that the caller's check refused


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A configuration and the empty model (meta device) that it builds."""

    config: PreTrainedConfig
    model: nn.Module


def shapes_of(model: nn.Module) -> Shapes:
    """Shape of every parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named}


def build_empty(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module | None:
    """The model that a configuration builds, on the meta device; None when it builds none."""
    enable_per_layer_config()
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class(config)
            model.tie_weights()  # skipped with the initialisation; a tied head has no shape of its own
            return model
    except Exception:  # whatever a model's own code raises, this configuration does not describe a model
        return None


def saved_and_read(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration as it comes back from its JSON; None when transformers refuses it."""
    enable_per_layer_config()
    try:
        return type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    except Exception:  # validators raise errors of many kinds
        return None


def find_blueprint(
    model: nn.Module,
    plan: PruningPlan,
    target: Shapes,
    accept: Callable[[Blueprint, Blueprint], bool] = lambda dense, cut: True,
) -> tuple[Blueprint, Blueprint] | None:
    """Search the configuration whose model has exactly the shapes of the cut one.

    Whole-number entries that may be a factor of a cut dimension are scaled as that dimension is,
    a few at a time, and the smallest change that gives the right shapes is taken. Where the layers
    differ, the entries go to ``per_layer_config``.

    Args:
        model: the dense model; nothing is read but its class, configuration and shapes.
        plan: what is cut.
        target: shapes of the cut model.
        accept: told what builds the dense and the cut model, says whether that is right; where shapes
            alone do not tell (into how many groups a router sorts its experts) the search goes on.

    Returns:
        What builds the dense and the cut model, or None when no configuration says the cut.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    if model.config.get_text_config(decoder=True) is not model.config:
        return None
    search = _Search(model, target)
    dense = search.build({})
    if dense is None or shapes_of(dense.model) != search.shapes:
        return None
    search.dense = dense
    refusals = 0
    for widths in search.solutions(profiles(plan, model.config.num_hidden_layers), {}):
        cut = search.build(widths)
        if cut is None or shapes_of(cut.model) != target or not _same_constants(dense.model, cut.model):
            continue
        if accept(dense, cut):
            return dense, cut
        refusals += 1
        if refusals == _MAX_REFUSALS:
            break
    return None


class _Search:
    """Tries configurations of one model; keeps nothing but what it was given and how many it tried."""

    def __init__(self, model: PreTrainedModel, target: Shapes) -> None:
        self.model_class = type(model)
        self.config = copy.deepcopy(model.config)
        self.shapes = shapes_of(model)
        self.target = target
        self.dense: Blueprint
        self.builds = 0
        self.layers = range(self.config.num_hidden_layers)
        self.values = {layer: vars(self.config.per_layer_config[layer]) for layer in self.layers}

    def build(self, widths: Widths) -> Blueprint | None:
        config = _with_widths(self.config, widths)
        if config is None:
            return None
        for chosen in IMPLEMENTATIONS:
            setattr(config, chosen, getattr(self.config, chosen, None))
        model = build_empty(self.model_class, config)
        return None if model is None else Blueprint(config, model)

    def solutions(self, pending: tuple[Profile, ...], widths: Widths) -> Iterator[Widths]:
        """Entries for all profiles, one profile after another, the smallest changes first.

        One entry may settle several (the head count of a fused projection), so a profile that finds
        none is tried again after the others.
        """
        if not pending:
            yield widths
        for profile in pending:
            settled = False
            for found, shapes in self._settlings(profile, widths):
                settled = True
                rest = tuple(p for p in pending if not self._is_settled(p, shapes))
                yield from self.solutions(rest, found)
            if settled:  # beginning with another profile would only find the same again
                return

    def _settlings(self, profile: Profile, widths: Widths) -> Iterator[tuple[Widths, Shapes]]:
        """Changes, small ones first, that bring a profile to its new size and nothing to a wrong one."""
        for proposal in self._proposals(profile):
            together = {**widths, **proposal}
            if self.builds >= _MAX_BUILDS:
                return
            self.builds += 1
            blueprint = self.build(together)
            if blueprint is None:
                continue
            shapes = shapes_of(blueprint.model)
            fits = self._on_the_way(shapes) and self._is_settled(profile, shapes)
            # With 4 KV heads of 4 channels, 3 channels give the right shapes and a wrong softmax scale.
            if fits and _same_constants(self.dense.model, blueprint.model):
                yield together, shapes

    def _is_settled(self, profile: Profile, shapes: Shapes) -> bool:
        return all(shapes[name][dim] == self.target[name][dim] for name, dim in profile.places)

    def _on_the_way(self, shapes: Shapes) -> bool:
        """True when every dimension has its old size or its new one."""
        return shapes.keys() == self.shapes.keys() and all(
            len(shape) == len(old) and all(now in both for now, *both in zip(shape, old, new, strict=True))
            for shape, old, new in (
                (shapes[name], self.shapes[name], self.target[name]) for name in self.shapes
            )
        )

    def _proposals(self, profile: Profile) -> Iterator[Widths]:
        entries = sorted(self._factors(profile), key=lambda entry: not self._likely(entry, profile))
        for count in range(1, min(_MAX_ENTRIES, len(entries)) + 1):
            for chosen in combinations(entries, count):
                widths = {entry: self._scaled(entry, profile) for entry in chosen}
                yield widths
                yield from ({**widths, **fixed} for fixed in self._fixed_head_dim(chosen, profile))
        yield from self._unset(profile)

    def _factors(self, profile: Profile) -> list[str]:
        """Entries that hold, in every layer that is cut, a factor of the cut dimensions."""
        found = []
        for entry, value in self.values[0].items():
            numbers = [self.values[layer].get(entry) for layer in profile.layers]
            if entry.startswith("_") or entry.endswith("_token_id") or isinstance(value, bool):
                continue
            if all(
                isinstance(number, int)
                and number > 1
                and profile.explains(number)
                and profile.scaled(number, layer) is not None
                for number, layer in zip(numbers, profile.layers, strict=True)
            ):
                found.append(entry)
        return found

    def _likely(self, entry: str, profile: Profile) -> bool:
        return self.values[profile.layers[0]][entry] in profile.groups

    def _scaled(self, entry: str, profile: Profile) -> dict[int, int]:
        return {layer: profile.scaled(self.values[layer][entry], layer) or 0 for layer in profile.layers}

    def _fixed_head_dim(self, chosen: tuple[str, ...], profile: Profile) -> Iterator[Widths]:
        """``head_dim`` as it was, for configurations that would derive it from the new head count."""
        if isinstance(self.values[0].get("head_dim"), int):
            return
        values = self.values[profile.layers[0]]
        wholes = {*profile.sizes, getattr(self.config.per_layer_config[0], "hidden_size", 0)}
        heads = {values[entry] for entry in chosen}
        heads.add(getattr(self.config.per_layer_config[0], "num_attention_heads", 1))
        options = {whole // count for whole in wholes for count in heads if whole % count == 0}
        for option in sorted(options - {0, 1}):
            yield {"head_dim": dict.fromkeys(self.layers, option)}

    def _unset(self, profile: Profile) -> Iterator[Widths]:
        """Entries that are None, where the code computes a width (GPT-2's ``n_inner``): the new width."""
        empty = [entry for entry, value in self.values[0].items() if value is None and entry[0] != "_"]
        sizes = {
            layer: {self.target[name][dim] for name, dim in profile.places if f".{layer}." in f".{name}"}
            for layer in profile.layers
        }
        if any(len(found) != 1 for found in sizes.values()):
            return
        for entry in empty:
            if not entry.endswith("_token_id"):
                yield {entry: {layer: next(iter(found)) for layer, found in sizes.items()}}


def _with_widths(config: PreTrainedConfig, widths: Widths) -> PreTrainedConfig | None:
    """A copy of ``config`` with new widths that survives saving and reading; None if there is none."""
    new = copy.deepcopy(config)
    unmark_config(new)
    try:
        overrides = _set_widths(new, widths)
        if overrides:
            mark_config(new)
            new.per_layer_config = overrides
    except (StrictDataclassError, AttributeError, TypeError, ValueError):  # no place for such a number
        return None
    if not overrides and saved_and_read(new) is None:
        mark_config(new)
    return new if saved_and_read(new) is not None else None


def _set_widths(config: PreTrainedConfig, widths: Widths) -> dict[int | str, dict[str, Any]]:
    """Set, in place, what is one value in all layers; return the overrides of single layers."""
    layers = range(config.num_hidden_layers)
    overrides: dict[int | str, dict[str, Any]] = {}
    if config.is_heterogeneous:
        overrides = copy.deepcopy(config._heterogeneity_spec.per_layer_overrides)
        config.per_layer_config = None
    for entry, by_layer in widths.items():
        current = {layer: overrides.get(layer, {}).get(entry, vars(config).get(entry)) for layer in layers}
        current.update(by_layer)
        for values in overrides.values():
            values.pop(entry, None)
        if len(set(current.values())) == 1:
            setattr(config, entry, current[0])
            continue
        for layer, value in current.items():
            overrides.setdefault(layer, {})[entry] = value
    return {layer: values for layer, values in overrides.items() if values}


def _same_constants(dense: nn.Module, cut: nn.Module) -> bool:
    """True when no number that is not a size (a softmax scale, an epsilon) differs between the two."""
    others = dict(cut.named_modules())
    for name, module in dense.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and vars(others[name]).get(attribute) != value:
                return False
    return True


def follow_blueprint(model: nn.Module, dense: nn.Module, cut: nn.Module) -> None:
    """Copy, in place, the sizes in which a freshly built cut model differs from a dense one.

    Args:
        model: the cut copy of the dense model.
        dense: freshly built from the old configuration.
        cut: freshly built from the new configuration; the configurations in it become the model's.
    """
    old, new = dict(dense.named_modules()), dict(cut.named_modules())
    for name, module in model.named_modules():
        if name not in old or name not in new:
            continue
        before, after = vars(old[name]), vars(new[name])
        for attribute, value in after.items():
            present = vars(module).get(attribute)
            if isinstance(value, PreTrainedConfig):
                follows = isinstance(present, PreTrainedConfig)
            else:  # a size that somebody changed by hand is left alone
                follows = _is_size(value) and present == before.get(attribute) != value
            if follows:
                setattr(module, attribute, value)


def _is_size(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_size(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["Blueprint", "build_empty", "find_blueprint", "follow_blueprint", "saved_and_read", "shapes_of"]
