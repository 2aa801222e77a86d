"""Units of depth in a plan: which of them may go, and what goes with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pruner_lib.discovery.units import depth_units, layer_of_unit

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap


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
