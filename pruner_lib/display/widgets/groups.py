"""The explorer of coupled slices."""

from __future__ import annotations

from html import escape

import ipywidgets as widgets
import numpy as np

from pruner_lib.discovery import DependencyMap, GroupFamily
from pruner_lib.display.coupling import describe_family
from pruner_lib.display.style import short
from pruner_lib.display.svg import coupling_svg
from pruner_lib.display.widgets.panel import Panel, buttons, items, table, tick, whole


class GroupExplorer(Panel):
    """See :func:`group_explorer`."""

    def __init__(self, dependencies: DependencyMap) -> None:
        self._dependencies = dependencies
        self._reasons: dict[str, str] = {}
        kinds = list(dict.fromkeys(family.kind for family in dependencies.families))
        first = "mlp_neuron" if "mlp_neuron" in kinds else kinds[0]
        picked = widgets.Text(layout={"display": "none"})
        picked.add_class("pruner-lab-picked")
        controls = {
            "kind": buttons("Kind", kinds, first),
            "layer": buttons("Layer", range(max(1, dependencies.num_layers)), 0, width="2.6em"),
            "index": whole("Group", 0, 0),
            "why": tick("Say which operators tie them"),
            "picked": picked,
        }
        super().__init__(controls, name="groups")
        self.children = (*controls.values(), self.picture, self.text)
        picked.observe(lambda change: self._pick(change["new"]), names="value")
        self.follow(self.kind, self.layer, self.index, self.why)

    @property
    def family(self) -> GroupFamily:
        """The family that the controls name."""
        families = self._dependencies.select(kind=self.kind.value, cuttable=False)
        spanning = families[0].layer is None
        # Hidden rather than disabled: ipywidgets does not redraw these buttons when they are disabled later.
        self.layer.layout.display = "none" if spanning else "flex"
        for family in families:
            if spanning or family.layer == self.layer.value:
                return family
        there = sorted({family.layer for family in families if family.layer is not None})
        raise ValueError(
            f"layer {self.layer.value} has no {self.kind.value}; layers {', '.join(map(str, there))} have"
        )

    def _pick(self, place_and_share: str) -> None:
        """A click on a drawn matrix: ``"2:0.25"`` is a quarter along the cut side of the third one."""
        if not place_and_share:
            return
        place, share = place_and_share.split(":")
        piece = self.family.slices[int(place)]
        size = self._dependencies.shapes[piece.parameter][piece.dim]
        index = min(size - 1, max(0, int(float(share) * size)))
        groups = np.flatnonzero((piece.index == index).reshape(len(piece.index), -1).any(axis=1))
        if len(groups):
            self.index.value = int(groups[0])
        self.picked.value = ""  # so that the same place can be clicked again

    def show(self) -> None:
        family = self.family
        if self.index.max != family.size - 1:
            # Lowering the maximum may lower the value, which calls this again; the last call wins.
            self.index.max = family.size - 1
        group = self.index.value
        line = describe_family(self._dependencies, family, group)
        self.picture.value = coupling_svg(self._dependencies, family, group, line)
        said = f"<b>{escape(line)}</b> {_state(family)}"
        if not self.why.value:
            rows = [
                f"{piece.parameter}, dimension {piece.dim}: {_some(piece.of([group]).tolist())}"
                for piece in family.slices
            ]
            self.say(f"{said}<ul>{items(rows)}</ul>")
            return
        if family.name not in self._reasons:  # the operators are the same for every group of a family
            self.say(f"{said}<br>Running the model once without weights to see which operators tie them …")
            self._reasons[family.name] = self._chain(family, group)
        self.say(f"{said}{self._reasons[family.name]}")

    def _chain(self, family: GroupFamily, group: int) -> str:
        """A table: each slice, and the operators between it and the slice that is read last."""
        piece = family.slices[-1]
        answer = self._dependencies.explain(piece.parameter, piece.dim, int(piece.of([group])[0]))
        links = [link for link in answer.links if link.family == family.name][: len(family.slices)]
        name = short if family.layer is not None else lambda parameter: parameter.removesuffix(".weight")
        rows = [
            [f"<b>{escape(name(link.parameter))}</b>", escape(" → ".join(link.because) or "(start here)")]
            for link in links[:12]
        ]
        more = f"<br>… and {len(links) - 12} more slices" if len(links) > 12 else ""
        start = f"{short(piece.parameter)}, dimension {piece.dim}"
        return (
            f"<br>From {escape(start)}, the operators on the way to each slice:"
            f"{table(['slice', 'tied through'], rows)}{more}"
        )


def _state(family: GroupFamily) -> str:
    if family.blocked:
        return f"This family <b>cannot be cut</b>: {escape(family.blocked)}."
    return "This family can be cut."


def _some(indices: list[int], most: int = 8) -> str:
    listed = ", ".join(map(str, indices[:most]))
    return listed if len(indices) <= most else f"{listed}, … ({len(indices)} in all)"


def group_explorer(dependencies: DependencyMap) -> GroupExplorer:
    """Choose a kind, a layer and a group: its slices light up on the matrices they run through.

    A click on a drawn matrix chooses the group that the clicked row or column belongs to. On demand the
    chain of operators that ties each slice to the others is listed; that runs the model once, on the
    meta device (about a second for 30 layers), and is remembered per family.

    Controls: ``kind``, ``layer``, ``index``, ``why``; ``picked`` takes the clicks on the drawing.

    Args:
        dependencies: what ``discover`` found.
    """
    return GroupExplorer(dependencies)
