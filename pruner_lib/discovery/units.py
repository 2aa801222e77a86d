"""Units of depth: whole decoder layers, and the attention and MLP inside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from .families import whole_number
from .grouping import layer_list

if TYPE_CHECKING:
    from .dependency_map import DependencyMap

UNITS = ("block", "attention", "mlp")
_INSIDE = {
    "attention": ("attention_head", "query_head", "qk_channel", "value_channel"),
    "mlp": ("mlp_neuron", "expert"),
}


def depth_units(dependencies: DependencyMap) -> dict[str, str]:
    """Every unit of depth of a model, by name, with the path of its module.

    A layer is ``layers.5``, its sublayers ``layers.5.attention`` and ``layers.5.mlp``. A sublayer is there
    only when one module of the layer holds all of its heads, or all of its neurons, and nothing of the
    other (OPT's two MLP matrices lie bare in the layer, so its MLP alone cannot go).

    Example:
        >>> depth_units(discover(llama))["layers.0.mlp"]
        'model.layers.0.mlp'
    """
    if dependencies._model is None:
        return {}
    path, count = layer_list(dependencies._model)
    units = {f"layers.{layer}": f"{path}.{layer}" for layer in range(count)}
    children: dict[tuple[int, str], set[str]] = {}
    for family in dependencies.families:
        for unit, kinds in _INSIDE.items():
            if family.kind in kinds and family.layer is not None:
                start = f"{path}.{family.layer}."
                inside = {piece.parameter.removeprefix(start).split(".")[0] for piece in family.slices}
                children.setdefault((family.layer, unit), set()).update(inside)
    for (layer, unit), found in sorted(children.items()):
        other = children.get((layer, "mlp" if unit == "attention" else "attention"), set())
        if len(found) == 1 and not found & other:
            units[f"layers.{layer}.{unit}"] = f"{path}.{layer}.{next(iter(found))}"
    return units


def layer_numbers(layers: int | Iterable[int]) -> list[int]:
    """Numbers of layers as they were given, one or several, as Python's integers.

    Raises:
        TypeError: something that is no whole number.
    """
    number = whole_number(layers)
    if number is not None:
        return [number]
    given = list(layers)  # type: ignore[arg-type]
    numbers = [number for number in map(whole_number, given) if number is not None]
    if len(numbers) < len(given):
        raise TypeError(f"layers are whole numbers, such as 5, range(4, 27) or [0, 1, 29], not {layers!r}")
    return numbers


def layer_of_unit(unit: str) -> int:
    """The layer in a unit's name: 5 of ``layers.5.mlp``."""
    return int(unit.split(".")[1])


def units_of_kind(dependencies: DependencyMap, kind: str, layers: Collection[int] | None = None) -> list[str]:
    """Units of depth of a kind in the layers.

    Raises:
        ValueError: the model has none, or none there.
    """
    ending = "" if kind == "block" else f".{kind}"
    every = [u for u in depth_units(dependencies) if u == f"layers.{layer_of_unit(u)}{ending}"]
    found = [unit for unit in every if layers is None or layer_of_unit(unit) in layers]
    if not found:
        reason = "no single module of a layer holds it" if not every else "none in these layers"
        raise ValueError(f"kind {kind!r}: this model has no such unit of depth that can be dropped: {reason}")
    return found
