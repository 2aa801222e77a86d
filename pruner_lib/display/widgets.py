"""Widgets: labelled controls that call functions of the library and show what these return.

Every widget is a box with its controls as attributes, so that a test or a cell can set them:
``explorer.index.value = 7``. What it shows is in ``picture`` (an image) and ``text``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from torch import nn

from pruner_lib.discovery import DependencyMap, GroupFamily
from pruner_lib.display.coupling import describe_family, draw_family
from pruner_lib.display.drawing import image_tag
from pruner_lib.display.importance import describe_ranks, plot_ranks
from pruner_lib.display.plan_cost import PlanCost
from pruner_lib.display.plans import describe_plan, plot_plan
from pruner_lib.evaluation import Cost, generate
from pruner_lib.importance import ImportanceScores
from pruner_lib.pruning import PruningPlan, plan_pruning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WIDE = {"description_width": "9em"}


class Panel(widgets.VBox):
    """Controls above, text and picture below; :meth:`show` runs at every change of a control."""

    def __init__(self, controls: Mapping[str, Any]) -> None:
        self.text = widgets.HTML()
        self.picture = widgets.HTML()
        for name, control in controls.items():
            setattr(self, name, control)
        super().__init__([*controls.values(), self.text, self.picture])

    def follow(self, *controls: Any) -> None:
        """Show now, and again whenever one of the controls changes."""
        for control in controls:
            control.observe(lambda change: self.update(), names="value")
        self.update()

    def update(self) -> None:
        """Show, or say in words why not."""
        try:
            self.show()
        except (ValueError, IndexError, KeyError) as error:
            self.text.value, self.picture.value = f"<b>Not possible:</b> {escape(str(error))}", ""

    @abstractmethod
    def show(self) -> None:
        """What the controls say now, into ``text`` and ``picture``."""


def _slider(label: str, value: float, low: float, high: float, step: float) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value=value, min=low, max=high, step=step, description=label, continuous_update=False, style=_WIDE
    )


def _whole(label: str, value: int, high: int) -> widgets.IntSlider:
    return widgets.IntSlider(
        value=value, min=0, max=high, description=label, continuous_update=False, style=_WIDE
    )


def _choice(label: str, options: Any, value: Any) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=label, style=_WIDE)


class GroupExplorer(Panel):
    """See :func:`group_explorer`."""

    def __init__(self, dependencies: DependencyMap) -> None:
        self._dependencies = dependencies
        self._reasons: dict[str, str] = {}
        kinds = list(dict.fromkeys(family.kind for family in dependencies.families))
        first = "mlp_neuron" if "mlp_neuron" in kinds else kinds[0]
        super().__init__(
            {
                "kind": _choice("Kind", kinds, first),
                "layer": _whole("Layer", 0, max(0, dependencies.num_layers - 1)),
                "index": _whole("Group", 0, 0),
                "why": widgets.Checkbox(value=False, description="Say why (takes seconds)", style=_WIDE),
            }
        )
        self.follow(self.kind, self.layer, self.index, self.why)

    @property
    def family(self) -> GroupFamily:
        """The family that the controls name."""
        families = self._dependencies.select(kind=self.kind.value, cuttable=False)
        spanning = families[0].layer is None
        self.layer.disabled = spanning
        for family in families:
            if spanning or family.layer == self.layer.value:
                return family
        raise KeyError(f"layer {self.layer.value} has no {self.kind.value}")

    def show(self) -> None:
        family = self.family
        if self.index.max != family.size - 1:
            # Lowering the maximum may lower the value, which calls this again; the last call wins.
            self.index.max = family.size - 1
        group = self.index.value
        lines = [
            f"{piece.parameter}, dimension {piece.dim}: {_some(piece.of([group]).tolist())}"
            for piece in family.slices
        ]
        state = f"cannot be cut: {family.blocked}" if family.blocked else "can be cut"
        line = describe_family(self._dependencies, family, group)
        said = f"<b>{escape(line)}</b> This family {escape(state)}."
        self.text.value = f"{said}<ul>{_items(lines)}</ul>{self._why(family, group)}"
        self.picture.value = image_tag(draw_family(self._dependencies, family, group), line)

    def _why(self, family: GroupFamily, group: int) -> str:
        if not self.why.value:
            return ""
        if family.name not in self._reasons:  # the operators are the same for every group of a family
            piece = family.slices[-1]
            answer = self._dependencies.explain(piece.parameter, piece.dim, int(piece.of([group])[0]))
            links = answer.links[-len(family.slices) :]
            for place, asked in enumerate(answer.families):
                if asked.name == family.name:
                    before = sum(len(other.slices) for other in answer.families[:place])
                    links = answer.links[before : before + len(family.slices)]
            reasons = [f"{link.parameter}: {' → '.join(link.because) or 'asked about'}" for link in links]
            self._reasons[family.name] = f"Tied to {escape(piece.parameter)} by<ul>{_items(reasons)}</ul>"
        return self._reasons[family.name]


def _some(indices: list[int], most: int = 8) -> str:
    listed = ", ".join(map(str, indices[:most]))
    return listed if len(indices) <= most else f"{listed}, … ({len(indices)} in all)"


def _items(lines: list[str], most: int = 12) -> str:
    extra = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"<li>{escape(line)}</li>" for line in [*lines[:most], *extra])


def group_explorer(dependencies: DependencyMap) -> GroupExplorer:
    """Choose a kind, a layer and a group: its slices light up, and are listed with their reasons.

    Controls: ``kind``, ``layer``, ``index``, ``why``.

    Args:
        dependencies: what ``discover`` found.
    """
    return GroupExplorer(dependencies)


class CriteriaExplorer(Panel):
    """See :func:`criteria_explorer`."""

    def __init__(self, scores: Mapping[str, ImportanceScores]) -> None:
        self._scores = dict(scores)
        names = list(self._scores)
        common = [name for name in self._scores[names[0]] if all(name in s for s in self._scores.values())]
        super().__init__(
            {
                "first": _choice("Across", names, names[0]),
                "second": _choice("Upwards", names, names[-1]),
                "family": _choice("Family", common, common[-1]),
                "ratio": _slider("Share removed", 0.25, 0.05, 0.95, 0.05),
            }
        )
        self.follow(self.first, self.second, self.family, self.ratio)

    def show(self) -> None:
        pair = self._scores[self.first.value], self._scores[self.second.value]
        line = describe_ranks(*pair, self.family.value, ratio=self.ratio.value)
        self.text.value = escape(line)
        self.picture.value = image_tag(plot_ranks(*pair, self.family.value, ratio=self.ratio.value), line)


def criteria_explorer(scores: Mapping[str, ImportanceScores]) -> CriteriaExplorer:
    """Choose two criteria and a family: ranks against each other, overlap and Spearman's ρ.

    Controls: ``first``, ``second``, ``family``, ``ratio``.

    Args:
        scores: name of the criterion to scores of the same families.
    """
    return CriteriaExplorer(scores)


class PlanExplorer(Panel):
    """See :func:`plan_explorer`."""

    def __init__(self, model: nn.Module, dependencies: DependencyMap, scores: Any) -> None:
        self._dependencies, self._scores = dependencies, scores
        self._cost = PlanCost(model)
        self.plan: PruningPlan | None = None
        self.cost = self._cost.dense
        last = max(0, dependencies.num_layers - 1)
        kinds = list(
            dict.fromkeys(dependencies.family(name).kind for name in scores if name in _names(dependencies))
        )
        usual = [kind for kind in kinds if kind in ("attention_head", "mlp_neuron")]
        super().__init__(
            {
                "ratio": _slider("Ratio", 0.25, 0.0, 0.95, 0.05),
                "layers": widgets.IntRangeSlider(
                    value=(0, last),
                    min=0,
                    max=last,
                    description="Layers",
                    continuous_update=False,
                    style=_WIDE,
                ),
                "kinds": widgets.SelectMultiple(
                    options=kinds,
                    value=usual or kinds[:1],
                    description="Kinds",
                    rows=min(4, len(kinds)),
                    style=_WIDE,
                ),
            }
        )
        self.follow(self.ratio, self.layers, self.kinds)

    def show(self) -> None:
        first, last = self.layers.value
        plan = plan_pruning(
            self._dependencies,
            self._scores,
            ratio=self.ratio.value,
            layers=range(first, last + 1),
            kinds=self.kinds.value,
        )
        self.plan, self.cost = plan, self._cost(plan)
        line = describe_plan(plan)
        self.text.value = f"{escape(line)}<ul>{_items(_compare(self._cost.dense, self.cost))}</ul>"
        self.picture.value = image_tag(plot_plan(plan), line)


def _names(dependencies: DependencyMap) -> set[str]:
    return {family.name for family in dependencies.families}


def _compare(dense: Cost, cut: Cost) -> list[str]:
    """Three lines, each a number before and after with the change."""
    rows = (
        ("million parameters", dense.params / 1e6, cut.params / 1e6),
        (
            f"G multiply-accumulates at {dense.batch_size} × {dense.seq_len} tokens",
            dense.macs / 1e9,
            cut.macs / 1e9,
        ),
        ("MiB of weights", dense.weight_bytes / 2**20, cut.weight_bytes / 2**20),
    )
    return [f"{a:,.2f} → {b:,.2f} {what} ({100 * (b / a - 1):+.1f} %)" for what, a, b in rows]


def plan_explorer(model: nn.Module, dependencies: DependencyMap, scores: Any) -> PlanExplorer:
    """Move the ratio and the layer range: parameters, multiply-accumulates and size before any cut.

    Everything comes from shapes; the model is not touched. Controls: ``ratio``, ``layers``,
    ``kinds``. The current plan and cost are ``plan`` and ``cost``.

    Args:
        model: the dense model.
        dependencies: what ``discover`` found in it.
        scores: ``ImportanceScores``, or family name to a tensor ``[size]``.
    """
    return PlanExplorer(model, dependencies, scores)


class GenerationBench(Panel):
    """See :func:`generation_bench`."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        writer: Callable[..., Any],
    ) -> None:
        self._models, self._tokenizer, self._writer = dict(models), tokenizer, writer
        super().__init__(
            {
                "prompt": widgets.Text(
                    value=prompt,
                    description="Prompt",
                    continuous_update=False,
                    style=_WIDE,
                    layout={"width": "90%"},
                ),
                "max_new_tokens": widgets.IntSlider(
                    value=30, min=5, max=100, description="New tokens", continuous_update=False, style=_WIDE
                ),
                "button": widgets.Button(description="Generate", icon="play"),
            }
        )
        self.text.value = "Press Generate, or Enter in the prompt."
        self.button.on_click(lambda button: self.update())
        self.prompt.observe(lambda change: self.update(), names="value")

    def show(self) -> None:
        self.text.value = "Writing …"
        table = self._writer(
            self._models, self._tokenizer, self.prompt.value, max_new_tokens=self.max_new_tokens.value
        )
        self.text.value = table._repr_html_()


def generation_bench(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "The capital of France is",
    writer: Callable[..., Any] = generate,
) -> GenerationBench:
    """Type a prompt: what each model writes after it, side by side.

    Nothing is written until ``button`` is pressed or the prompt changes. Controls: ``prompt``,
    ``max_new_tokens``, ``button``.

    Args:
        models: name to model, for example dense, pruned and recovered.
        tokenizer: theirs.
        prompt: to begin with.
        writer: called as ``generate`` is; what it returns must have an HTML form.
    """
    return GenerationBench(models, tokenizer, prompt, writer)
