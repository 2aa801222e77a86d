"""Units of depth: whole decoder layers, and the attention and MLP inside them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pruner_lib.discovery.grouping import layer_list

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

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


def layer_of_unit(unit: str) -> int:
    """The layer in a unit's name: 5 of ``layers.5.mlp``."""
    return int(unit.split(".")[1])


def checked_units(dependencies: DependencyMap, dropped: Iterable[str]) -> tuple[str, ...]:
    """Units in the order of the layers, each once, without sublayers of layers that go whole.

    Raises:
        ValueError: a unit that the model has not, or every layer.
    """
    wanted = list(dict.fromkeys([dropped] if isinstance(dropped, str) else dropped))
    if not wanted:
        return ()
    units = depth_units(dependencies)
    for unit in wanted:
        if unit not in units:
            near = difflib.get_close_matches(str(unit), units, n=3, cutoff=0.5) or list(units)[:3]
            raise ValueError(
                f"no unit of depth {unit!r} in this model of {dependencies.num_layers} layers; a layer is "
                f"'layers.5', its sublayers 'layers.5.attention' and 'layers.5.mlp' where one module holds "
                f"them. Near names: {', '.join(near) or 'none'}"
            )
    whole = {unit for unit in wanted if unit.count(".") == 1}
    if len(whole) == dependencies.num_layers:
        raise ValueError(f"all {len(whole)} layers would go; at least one must stay")
    kept = [unit for unit in wanted if unit in whole or unit.rpartition(".")[0] not in whole]
    return tuple(sorted(kept, key=lambda unit: (layer_of_unit(unit), unit)))


def without_dropped(
    dependencies: DependencyMap, removal: Mapping[str, Sequence[int]], dropped: Iterable[str]
) -> dict[str, Sequence[int]]:
    """A removal without the families that lie in dropped units, which go with them."""
    units = depth_units(dependencies) if dropped else {}
    inside = tuple(f"{units[unit]}." for unit in dropped)
    if not inside:
        return dict(removal)
    families = {family.name: family for family in dependencies.families}
    return {
        name: groups
        for name, groups in removal.items()
        if name not in families or not all(s.parameter.startswith(inside) for s in families[name].slices)
    }
