"""The planner: what a plan leaves, before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import ipywidgets as widgets
from torch import nn

from pruner_lib.checkpoint import Compatibility, Foresight
from pruner_lib.discovery import DependencyMap
from pruner_lib.display.plan_cost import PlanCost
from pruner_lib.display.plans import describe_plan, layer_params
from pruner_lib.display.style import COLOURS, GREY, INK
from pruner_lib.display.svg import bars_svg, scaled
from pruner_lib.display.widgets.panel import (
    READABLE,
    Choices,
    Panel,
    between,
    buttons,
    choice,
    share,
    table,
    tick,
)
from pruner_lib.evaluation import Cost
from pruner_lib.pruning import PruningPlan, plan_pruning

# What the slider means, to the argument of plan_pruning and the words beside the slider.
GOALS = {
    "ratio of groups": ("ratio", "Ratio removed"),
    "parameters": ("target_params", "Share that stays"),
    "multiply-accumulates": ("target_macs", "Share that stays"),
    "bytes": ("target_bytes", "Share that stays"),
}
# Heads and experts are few: nobody wants a multiple of 64 of them.
_ROUNDED = ("mlp_neuron", "hidden_channel")
_SIGNS = {"yes": "✔ yes", "partly": "◐ partly", "no": "✘ no", "untested": "? untested"}


class PlanExplorer(Panel):
    """See :func:`plan_explorer`."""

    def __init__(self, model: nn.Module, dependencies: DependencyMap, scores: Any) -> None:
        self._dependencies, self._scores = dependencies, scores
        self._cost, self._foresight = PlanCost(model), Foresight(model)
        self.plan: PruningPlan | None = None
        self.cost = self._cost.dense
        self.formats: Compatibility | None = None
        last = max(0, dependencies.num_layers - 1)
        kinds = _kinds(dependencies, scores)
        usual = [kind for kind in kinds if kind in ("attention_head", "mlp_neuron")]
        controls = {
            "goal": buttons("Aim for", list(GOALS), "ratio of groups"),
            "amount": share("Ratio removed", 0.25, 0.0, 0.95),
            "scope": buttons("Ranking", ["local", "global"], "local"),
            "layers": between("Layers", _scored_layers(dependencies, scores), last),
            "kinds": Choices("Kinds", kinds, usual or kinds[:1]),
            "round_to": choice("Multiples of", [1, 8, 16, 32, 64, 128, 256], 1),
            "uniform": tick("Same width in every layer"),
        }
        super().__init__(controls, name="planner")
        self.compatible = widgets.HTML()
        self.children = (*controls.values(), self.text, self.picture, self.compatible)
        self.goal.observe(lambda change: self._aim(), names="value")
        self.follow(self.goal, self.amount, self.scope, self.layers, self.kinds, self.round_to, self.uniform)

    def _aim(self) -> None:
        """The slider changes its meaning: what stays instead of what goes, or back."""
        label = GOALS[self.goal.value][1]
        if self.amount.description != label:
            self.amount.description = label
            self.amount.value = round(1 - self.amount.value, 2)

    def update(self) -> None:
        """Show, or say why not and what that leaves unknown."""
        self.plan, self.formats = None, None
        super().update()
        if self.plan is None:
            self.compatible.value = ""

    def show(self) -> None:
        plan = plan_pruning(self._dependencies, self._scores, **self._asked())
        self.cost = self._cost(plan)
        before, after = layer_params(plan)
        line = describe_plan(plan)
        self.say(f"{escape(line)}{_totals(self._cost.dense, self.cost)}")
        self.picture.value = bars_svg(after.tolist(), before.tolist(), line)
        self.plan = plan
        if not self._foresight.knows(plan):
            self.compatible.value = "<i>Asking what could open it …</i>"
        self.formats = self._foresight(plan)
        self.compatible.value = _answers(self.formats)

    def _asked(self) -> dict[str, Any]:
        """The controls as arguments of ``plan_pruning``."""
        first, last = self.layers.value
        everywhere = (first, last) == (self.layers.min, self.layers.max)
        rounded = {kind: self.round_to.value for kind in self.kinds.value if kind in _ROUNDED}
        return {
            GOALS[self.goal.value][0]: self.amount.value,
            "scope": self.scope.value,
            "layers": None if everywhere else range(first, last + 1),
            "kinds": self.kinds.value,
            "round_to": rounded or 1,
            "uniform": self.uniform.value,
        }


def _kinds(dependencies: DependencyMap, scores: Any) -> list[str]:
    """Kinds that have scores and may be cut, in the order of the scores."""
    known = {family.name: family.kind for family in dependencies.families if family.cuttable}
    return list(dict.fromkeys(known[name] for name in scores if name in known))


def _scored_layers(dependencies: DependencyMap, scores: Any) -> tuple[int, int]:
    """First and last layer that has scores: where a plan can begin and end."""
    layers = [f.layer for f in dependencies.families if f.layer is not None and f.name in scores]
    return (min(layers), max(layers)) if layers else (0, max(0, dependencies.num_layers - 1))


def _totals(dense: Cost, cut: Cost) -> str:
    """Numbers before and after with the change, and a bar for what stays."""
    rows: list[tuple[str, float, int, int]] = [
        ("parameters", 1e3, dense.params, cut.params),
        (f"multiply-accumulates at {dense.batch_size} × {dense.seq_len}", 1e3, dense.macs, cut.macs),
        ("weights in memory", 2**10, dense.weight_bytes, cut.weight_bytes),
    ]
    if dense.kv_cache_bytes_per_token and cut.kv_cache_bytes_per_token is not None:
        cache = dense.kv_cache_bytes_per_token, cut.kv_cache_bytes_per_token
        rows.append(("KV cache per token", 2**10, *cache))
    cells = []
    for what, base, a, b in rows:
        unit, letter = scaled(a, base)
        suffix = letter if base == 1e3 else f"{letter}iB" if letter else "bytes"
        numbers = f"{a / unit:,.2f} → <b>{b / unit:,.2f} {suffix}</b>"
        cells.append([what, numbers, f"{100 * (b / a - 1):+.1f} %", _bar(b / a)])
    return table(["", "dense → planned", "change", ""], cells)


def _bar(kept: float) -> str:
    return (
        f'<div aria-hidden="true" style="width:12em;height:0.9em;background:{GREY};border:1px solid {INK}">'
        f'<div style="width:{100 * kept:.1f}%;height:100%;background:{COLOURS[0]}"></div></div>'
    )


def _answers(found: Compatibility) -> str:
    rows = [
        [_unbroken(escape(answer.program)), _unbroken(f"<b>{_SIGNS[answer.verdict]}</b>"), escape(answer.why)]
        for answer in found.answers
    ]
    return f'<div style="{READABLE}">{table(["What will open it", "", ""], rows)}</div>'


def _unbroken(html: str) -> str:
    return f'<span style="white-space:nowrap">{html}</span>'


def plan_explorer(
    model: nn.Module, dependencies: DependencyMap, scores: Mapping[str, Any] | Any
) -> PlanExplorer:
    """Move the sliders: parameters per layer, costs, and what could open the result, before any cut.

    Everything comes from shapes and from configurations without weights; the model is not touched. The
    first plan of a kind (other kinds of groups, layers of unequal width) asks transformers once
    whether a configuration can say it, about a second for 30 layers.

    Controls: ``goal`` (what the slider aims for), ``amount`` (the slider), ``scope``, ``layers``, ``kinds``,
    ``round_to`` (of neurons and residual channels), ``uniform``. The current plan, its cost and what opens it
    are ``plan``, ``cost`` and ``formats``; ``plan`` is None while the controls ask for the impossible.

    Args:
        model: the dense model.
        dependencies: what ``discover`` found in it.
        scores: ``ImportanceScores``, or family name to a tensor ``[size]``.
    """
    return PlanExplorer(model, dependencies, scores)
