"""Decoder layers that repeat one another, so that a few of them stand for all in the cut's self-check."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from pruner_lib.discovery.grouping import layer_list
from pruner_lib.pruning.dropping import remove_layers
from pruner_lib.pruning.sublayers import LAYER_NUMBERS

_HELD = frozenset({"_parameters", "_buffers", "_modules"})  # seen by their names, shapes and places


@dataclass(frozen=True, eq=False)
class StandIns:
    """A model with only those decoder layers that no other layer repeats.

    Attributes:
        model: the short model; shares its tensors with the long one.
        path: of the list of layers.
        kept: numbers of the layers left, in the long model.
    """

    model: nn.Module
    path: str
    kept: tuple[int, ...]

    def renamed(self, name: str) -> str | None:
        """A parameter's or module's name in the short model; None when its layer is not there."""
        layer = _layer_in(name, self.path)
        if layer is None:
            return name
        if layer not in self.kept:
            return None
        start = f"{self.path}.{layer}"
        return f"{self.path}.{self.kept.index(layer)}{name[len(start) :]}"


def stand_ins(model: nn.Module, facts: Mapping[int, Any]) -> StandIns | None:
    """The shorter model whose discovery says what discovery of ``model`` would.

    Layers are alike when they have the same code, the same numbers and settings (apart from the layer's
    own number), tensors of the same shapes, and when the same ``facts`` are known of them. Discovery of
    a layer is a function of these alone: its equations are those of the other with the parameters renamed,
    and they meet the rest of the model through the same activations, so the equations of one layer say all
    that those of its likes say. The first *and* the last of each sort stay, so that what ties one layer to
    another (channels of the rotary table) is seen too.

    Args:
        model: on the meta device; left as it is.
        facts: what else must agree, by layer.

    Returns:
        None when every layer is of its own sort, there are too few to gain anything, or the model cannot
        be made shorter.
    """
    path, count = layer_list(model)
    if count < 3:
        return None
    holder = model.get_submodule(path)
    shared = _shared_tensors(model)
    seen: dict[int, Any] = {}
    sorts: dict[Any, list[int]] = {}
    for number, layer in enumerate(holder.children()):
        sort = (_code(layer, number, shared, seen), facts.get(number))
        sorts.setdefault(sort, []).append(number)
    kept = sorted({number for numbers in sorts.values() for number in (numbers[0], numbers[-1])})
    if len(kept) == count:
        return None
    gone = {n: layer for n, layer in enumerate(holder.children()) if n not in kept}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(layer): layer for layer in gone.values()}
    short = copy.deepcopy(model, memo)
    try:
        remove_layers(short, {number: f"{path}.{number}" for number in gone})
    except (
        Exception
    ):  # a configuration of an unknown kind raises in its own way; then all layers are looked at
        return None
    return StandIns(short, path, tuple(kept))


def by_layer(model: nn.Module, facts: Iterable[tuple[str, Any]]) -> dict[int, frozenset[tuple[str, Any]]]:
    """Facts about parameters or modules, by layer, the layer's number left out of the names."""
    path, _ = layer_list(model)
    found: dict[int, set[tuple[str, Any]]] = {}
    for name, fact in facts:
        layer = _layer_in(name, path)
        if layer is not None:
            found.setdefault(layer, set()).add((name[len(f"{path}.{layer}") :], fact))
    return {layer: frozenset(known) for layer, known in found.items()}


def _layer_in(name: str, path: str) -> int | None:
    if not name.startswith(f"{path}."):
        return None
    return int(name[len(path) + 1 :].split(".")[0])


def _shared_tensors(model: nn.Module) -> frozenset[int]:
    """Tensors that occur at more than one place: a tied weight makes its layer a sort of its own."""
    places: dict[int, int] = {}
    for tensor in (
        *(p for _, p in model.named_parameters(remove_duplicate=False)),
        *(b for _, b in model.named_buffers(remove_duplicate=False)),
    ):
        places[id(tensor)] = places.get(id(tensor), 0) + 1
    return frozenset(tensor for tensor, count in places.items() if count > 1)


def _code(layer: nn.Module, number: int, shared: frozenset[int], seen: dict[int, Any]) -> Any:
    """Everything that a layer's forward may depend on, apart from values and the layer's number."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: _own(module, value) if key not in LAYER_NUMBERS or value != number else "its own number"
            for key, value in vars(module).items()
            if key not in _HELD
        }
        parts.append((name, type(module), _frozen(settings, seen)))
        parts.extend((name, key, _tensor(value, shared)) for key, value in _tensors(module))
    return tuple(parts)


def _own(module: nn.Module, value: Any) -> Any:
    """A method of the module itself by its function alone: every layer binds one of its own."""
    return value.__func__ if getattr(value, "__self__", None) is module else value


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _tensor(tensor: torch.Tensor | None, shared: frozenset[int]) -> Any:
    if tensor is None:
        return None
    return tuple(tensor.shape), tensor.dtype, id(tensor) if id(tensor) in shared else None


def _frozen(value: Any, seen: dict[int, Any]) -> Any:
    """A hashable that is equal for equal plain values; an object of another kind equals itself alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(item, seen) for item in value)
    if isinstance(value, dict):
        return type(value), tuple((key, _frozen(item, seen)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_frozen(item, seen) for item in value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in seen:
            seen[id(value)] = (type(value), _frozen(vars(value), seen))
        return seen[id(value)]
    if isinstance(value, functools.partial):
        return "partial", value.func, _frozen(value.args, seen), _frozen(value.keywords, seen)
    return "object", id(value)
