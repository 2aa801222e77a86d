"""Decoder layers without their attention or their MLP, and the slots of the cache that are left."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")


class NoSublayer(nn.Module):
    """Stands where an attention or MLP was, and adds nothing to the residual stream.

    Returns zeros of the input's shape, or the residual itself where the sublayer adds it on its own
    (BLOOM), followed by as many None as the sublayer returned values besides.

    Args:
        sublayer: what was there.
        kind: ``"attention"`` or ``"mlp"``.
        values: length of the tuple that it returned; None for a bare tensor.
    """

    def __init__(self, sublayer: nn.Module, kind: str, values: int | None) -> None:
        super().__init__()
        self.adds_residual = "residual" in inspect.signature(sublayer.forward).parameters
        self.kind = kind
        self.values = values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        if self.adds_residual:
            out = kwargs["residual"] if "residual" in kwargs else args[1]
        else:
            out = torch.zeros_like(hidden)
        return out if self.values is None else (out, *[None] * (self.values - 1))

    def described(self) -> dict[str, Any]:
        """What has to be known, besides the sublayer itself, to put this in its place again."""
        return {"kind": self.kind, "values": self.values}


def missing_sublayers(holder: nn.Module) -> dict[int, dict[str, NoSublayer]]:
    """Layer number to what is gone from it, by its name in the layer.

    Args:
        holder: the list of decoder layers.
    """
    found = {
        number: {name: child for name, child in layer.named_children() if isinstance(child, NoSublayer)}
        for number, layer in enumerate(holder.children())
    }
    return {number: gone for number, gone in found.items() if gone}


def without_attention(gone: Mapping[int, Mapping[str, NoSublayer]]) -> set[int]:
    """Layers whose attention is among what is gone."""
    return {n for n, left in gone.items() if any(child.kind == "attention" for child in left.values())}


def cache_slots(types: Sequence[str], without: Collection[int]) -> list[int]:
    """The slot of the key-value cache that each layer uses.

    A cache tells its length by the first slot of a type (full or sliding), which must be in use: so the
    attentions that are left take the first slots of their type. A layer without attention keeps its number.

    Example:
        >>> cache_slots(["full", "sliding", "full", "full"], without={0})
        [0, 1, 0, 2]

    Args:
        types: type of each layer.
        without: layers without attention.
    """
    slots = list(range(len(types)))
    for kind in dict.fromkeys(types):
        places = [layer for layer, found in enumerate(types) if found == kind]
        users = [layer for layer in places if layer not in without]
        for slot, layer in zip(places, users, strict=False):
            slots[layer] = slot
    return slots


def layer_types(config: Any, count: int) -> list[str]:
    """Type of each layer's cache, from a configuration; all alike where it says nothing."""
    return list(getattr(config, "layer_types", None) or [""] * count)


def renumber(layer: nn.Module, old: int, new: int) -> None:
    """Give the modules of a layer that hold its number another one, in place."""
    for module in layer.modules():
        for name in LAYER_NUMBERS:
            if vars(module).get(name) == old:
                setattr(module, name, new)
