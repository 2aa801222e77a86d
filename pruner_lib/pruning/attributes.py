"""Sizes that a model's code keeps outside its weights: found by trying, kept when confirmed.

Used where no configuration describes the cut model (GPT-2's heads: the width of attention is the
width of the model). Whole numbers on the modules around a cut weight, and in their copy of the
configuration, that may be a factor of the cut dimension are scaled as the dimension is, none first,
then one, then two together, until the caller's check confirms the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from pruner_lib.pruning.ratios import Profile, layer_of, role_of
from pruner_lib.pruning.slicing import SHAPE_NAMES

NO_WIDTH = SHAPE_NAMES | {"num_hidden_layers"}
_MAX_CHANGES = 4  # numbers scaled together
_MAX_TRIES = 100  # checks made before giving up, each a discovery; several kinds are cut one by one


@dataclass(frozen=True)
class Site:
    """One number that code keeps, the same in every layer: ``transformer.h.*.attn``, ``split_size``.

    Attributes:
        role: module name, the layer's number replaced by ``*``.
        attribute: name on the module, or of the configuration entry.
        position: index in a list or tuple, or None.
        in_config: the number is in the module's configuration.
        profile: the dimensions it would shrink with.
    """

    role: str
    attribute: str
    position: int | None
    in_config: bool
    profile: Profile

    @property
    def place(self) -> tuple[str, str, int | None, bool]:
        return self.role, self.attribute, self.position, self.in_config


Assignment = tuple[Site, ...]


def find_assignment(
    model: nn.Module, profiles: tuple[Profile, ...], num_layers: int, confirm: Callable[[Assignment], bool]
) -> Assignment | None:
    """The smallest set of numbers to scale that ``confirm`` accepts.

    Args:
        model: the cut copy, with the old numbers.
        profiles: how dimensions shrank.
        num_layers: decoder layers.
        confirm: told an assignment, says whether the model is right with it.

    Returns:
        The assignment (empty when nothing has to change), or None when none was confirmed.
    """
    sites = list(dict.fromkeys(site for profile in profiles for site in _sites(model, profile, num_layers)))
    sites.sort(key=lambda site: (site.in_config, _value(model, site, num_layers) not in site.profile.groups))
    tries = islice(_assignments(sites), _MAX_TRIES)
    return next((assignment for assignment in tries if confirm(assignment)), None)


def _assignments(sites: list[Site]) -> Iterator[Assignment]:
    """Sets of sites, small ones first; a number is scaled once."""
    for count in range(min(_MAX_CHANGES, len(sites)) + 1):
        for assignment in combinations(sites, count):
            if len({site.place for site in assignment}) == count:
                yield assignment


def apply_assignment(model: nn.Module, assignment: Assignment, num_layers: int) -> None:
    """Scale the numbers of an assignment, in place."""
    for site in assignment:
        for name, module in model.named_modules():
            layer = layer_of(name, num_layers)
            if role_of(name) != site.role or layer is None or layer not in site.profile.layers:
                continue
            holder: Any = module
            if site.in_config:
                module.config = holder = copy.copy(module.config)
            _scale(holder, site, layer)


def _scale(holder: Any, site: Site, layer: int) -> None:
    value = vars(holder)[site.attribute]
    old = value if site.position is None else value[site.position]
    new = site.profile.scaled(old, layer)
    if new is None:  # layers that hold different numbers: this one is no multiple, so it is no such size
        return
    if site.position is not None:
        items = list(value)
        items[site.position] = new
        new = type(value)(items)
    vars(holder)[site.attribute] = new  # not by setattr: a configuration's validators know only the old sizes


def _sites(model: nn.Module, profile: Profile, num_layers: int) -> Iterator[Site]:
    """Numbers on the modules that own, or contain within the layer, a weight of the profile."""
    layer = profile.layers[0]
    modules = dict(model.named_modules())
    owners: dict[str, None] = {}
    for parameter, _ in sorted(profile.places):
        parts = parameter.split(".")
        for length in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:length])
            if layer_of(name, num_layers) == layer and not isinstance(modules[name], nn.ModuleList):
                owners[name] = None
    for name in owners:
        module = modules[name]
        config = vars(module).get("config")
        for in_config, holder in ((False, module), (True, config)):
            if holder is None or (in_config and not isinstance(holder, PreTrainedConfig)):
                continue
            for attribute, position, value in _numbers(holder):
                if profile.explains(value) and all(profile.scaled(value, k) for k in profile.layers):
                    yield Site(role_of(name), attribute, position, in_config, profile)


def _numbers(holder: Any) -> Iterator[tuple[str, int | None, int]]:
    for attribute, value in vars(holder).items():
        if attribute.startswith("_") or attribute in NO_WIDTH or attribute.endswith("_token_id"):
            continue
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for position, item in items:
            if isinstance(item, int) and not isinstance(item, bool) and item > 1:
                yield attribute, position, item


def _value(model: nn.Module, site: Site, num_layers: int) -> int:
    for name, module in model.named_modules():
        if role_of(name) == site.role and layer_of(name, num_layers) == site.profile.layers[0]:
            value = vars(module.config if site.in_config else module)[site.attribute]
            return value if site.position is None else value[site.position]
    raise KeyError(site.role)
