"""Families that are free by their labels, but whose new size the model's code has no way to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .families import GroupFamily
from .state import Trace

ONE_HEAD_SIZE = "one head size serves query, key and value, so the code cannot say a size of its own"
ONE_WIDTH = (
    "torch's nn.MultiheadAttention has one embed_dim for the width outside and for heads × channels inside, "
    "so neither can be said alone"
)


class Sayable:
    """Evidence from the operators and modules on which sizes share one number in the code."""

    def __init__(self, trace: Trace, model: nn.Module, families: Sequence[GroupFamily]) -> None:
        self.families = families
        self.widths: dict[str, dict[str, set[tuple[int, int]]]] = {"attended": {}, "mixed": {}}
        for event in trace.events:
            if event.role in self.widths:
                known = len(event.labels), int(trace.store.find(event.labels[:1])[0])
                self.widths[event.role].setdefault(event.module, set()).add(known)
        self.rigid = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
        )

    def checked(self, family: GroupFamily) -> GroupFamily:
        """The family, blocked with the reason where no number in the code is its own."""
        if family.blocked:
            return family
        if family.kind in ("qk_channel", "value_channel") and self._shares_head_size(family):
            return replace(family, blocked=ONE_HEAD_SIZE)
        if self.rigid and any(s.parameter.startswith(self.rigid) for s in family.slices):
            return replace(family, blocked=ONE_WIDTH)
        return family

    def _shares_head_size(self, family: GroupFamily) -> bool:
        """True when one attention has QK and value channels of the same number per head."""
        other = "value_channel" if family.kind == "qk_channel" else "qk_channel"
        mine = _owners(family)
        return any(
            self._one_width(module)
            for rival in self.families
            if rival.kind == other
            for module in mine & _owners(rival)
        )

    def _one_width(self, module: str) -> bool:
        attended, mixed = (self.widths[role].get(module, set()) for role in ("attended", "mixed"))
        # Where the sequence has labels (of masks, of attention sinks) it is mixed first and attended then.
        return not {w for w, _ in attended - mixed}.isdisjoint(w for w, _ in mixed - attended)


def _owners(family: GroupFamily) -> set[str]:
    """Modules that hold the layers a family runs through: ``model.layers.0.self_attn``."""
    return {piece.parameter.rsplit(".", 2)[0] for piece in family.slices}
