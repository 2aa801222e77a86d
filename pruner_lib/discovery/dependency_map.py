"""The result of discovery: every family of coupled groups of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .explanation import Explanation, explain_group
from .families import GroupFamily, Removal, UnknownFamilyError
from .grouping import build_families, layer_list
from .summary import as_html, as_text
from .tracing import meta_copy, refuse_quantised, run
from .units import layer_numbers
from .zeroing import NormIndex, norm_indices, zero_groups


@dataclass(frozen=True, eq=False)
class DependencyMap:
    """Families of coupled slices, found by one symbolic run.

    Attributes:
        families: in the order in which the model uses them.
        shapes: shape of every parameter and buffer.
        aliases: other names of tied parameters → the name used in the slices.
        num_layers: number of decoder layers.
        without_rule: operators without a rule that touched labels → modules that called them.
        buffers: names in ``shapes`` that are buffers.
        norms: where norms average, and routers choose, over the groups of a family.
        factors: ``(module, operator, number)`` of the numbers the code multiplies with or adds to what
            is learned: softmax scales, epsilons. A cut must leave them as they are.
    """

    families: tuple[GroupFamily, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    num_layers: int
    without_rule: Mapping[str, tuple[str, ...]]
    buffers: frozenset[str] = frozenset()
    norms: tuple[NormIndex, ...] = ()
    factors: tuple[tuple[str, str, float], ...] = field(default=(), repr=False)
    _model: nn.Module | None = field(default=None, repr=False)
    _inputs: Mapping[str, Any] | None = field(default=None, repr=False)

    def family(self, name: str) -> GroupFamily:
        """The family of that name; UnknownFamilyError lists near names."""
        for family in self.families:
            if family.name == name:
                return family
        names = [f.name for f in self.families]
        near = difflib.get_close_matches(name, names, n=3) or names[:5]
        raise UnknownFamilyError(f"no family {name!r} among {len(names)}; did you mean {', '.join(near)}?")

    def select(
        self,
        kind: str | Iterable[str] | None = None,
        layers: int | Iterable[int] | None = None,
        cuttable: bool = True,
    ) -> tuple[GroupFamily, ...]:
        """Families of a kind (or several) in given layers, only those that may be cut by default."""
        kinds = None if kind is None else {kind} if isinstance(kind, str) else set(kind)
        wanted = None if layers is None else set(layer_numbers(layers))
        return tuple(
            f
            for f in self.families
            if (kinds is None or f.kind in kinds)
            and (wanted is None or f.layer in wanted)
            and (f.cuttable or not cuttable)
        )

    def explain(self, parameter: str, dim: int, index: int) -> Explanation:
        """The group that one index of one parameter belongs to, and why each slice is tied to it."""
        return explain_group(self, parameter, dim, index)

    def zero(self, model: nn.Module, removal: Removal) -> nn.Module:
        """A copy of ``model`` with those groups zeroed and nothing cut: the oracle for ``prune``.

        Where a norm averages over removed channels, the copy averages over what remains.

        Raises:
            UnknownFamilyError: a family that is not in the map.
            ValueError: a group that its family has not.
        """
        return zero_groups(self, model, removal)

    def plot(self, family: str | GroupFamily | None = None, groups: int | Sequence[int] = 0) -> Any:
        """A family's matrices with the slices of some groups as coloured stripes; see ``pruner_lib.display``.

        Args:
            family: a family or its name; the first that may be cut within one layer when not given.
            groups: one group index or several.
        """
        from pruner_lib import display

        inside = [f for f in self.select() if f.layer is not None] or list(self.families)
        return display.draw_family(self, inside[0] if family is None else family, groups)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self)


def discover(model: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> DependencyMap:
    """Find every set of parameter slices that must be removed together.

    The model runs once on the meta device (no weights, no data); each operator says how labels flow
    through it, and slices whose labels are equal belong together. Nothing is known of any particular
    architecture. The model is not changed.

    Args:
        model: a causal language model, or any module; weights may be on the meta device.
        example_inputs: keyword arguments of one forward call, when token ids alone do not do.

    Raises:
        DiscoveryError: the model cannot be run on the meta device, or is quantised.
        TypeError: no module, or example inputs that are no mapping.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"discover wants a model (torch.nn.Module; load_model gives one), not {model!r:.80}")
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise TypeError(
            "example_inputs are the keyword arguments of one forward call, such as {'input_ids': tokens}, "
            f"not a {type(example_inputs).__name__}"
        )
    refuse_quantised(model)
    skeleton = meta_copy(model)
    trace, labels = run(skeleton, example_inputs)
    grouping = build_families(trace, labels, skeleton)
    norms = norm_indices(trace, grouping)
    families = [
        replace(f, normed_by=tuple(dict.fromkeys(n.module for n in norms if n.family == f.name)))
        for f in grouping.families
    ]
    names = {id(p): name for name, p in skeleton.named_parameters()}
    aliases = {
        name: names[id(p)]
        for name, p in skeleton.named_parameters(remove_duplicate=False)
        if names[id(p)] != name
    }
    shapes = {name: tuple(t.shape) for name, t in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
    without = {op: tuple(sorted(where)) for op, where in trace.without_rule.items()}
    _, count = layer_list(skeleton)
    return DependencyMap(
        families=tuple(families),
        shapes=shapes,
        aliases=aliases,
        num_layers=count,
        without_rule=without,
        buffers=frozenset(name for name, _ in skeleton.named_buffers()),
        norms=tuple(norms),
        factors=tuple(sorted(trace.factors)),
        _model=skeleton,
        _inputs=example_inputs,
    )
