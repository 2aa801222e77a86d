"""What will be able to open the model that a plan leaves, said before anything is cut."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from pruner_lib.checkpoint.compatibility import Answer, Compatibility, answers_by_rows, compatibility
from pruner_lib.checkpoint.gguf_layout import DIALECTS
from pruner_lib.pruning.configuration import find_blueprint, shapes_of
from pruner_lib.pruning.slicing import meta_copy, sliced_copy
from pruner_lib.pruning.surgery import prune

if TYPE_CHECKING:
    from pruner_lib.pruning import PruningPlan

_ROWS = {  # what a matrix row runs over, by the parameter whose row it is
    "residual channels": "embed_tokens.weight",
    "heads × head size": "self_attn.o_proj.weight",
    "MLP neurons": "mlp.down_proj.weight",
}


class Foresight:
    """Answers of ``compatibility(prune(model, plan))`` for one plan after another, without the cut.

    Whether a configuration can say a cut hangs on which kinds shrink and whether the layers stay alike,
    hardly on the numbers: it is tried once for each such pattern, on the meta device (about a second for 30
    layers), and remembered. The lengths of the matrix rows, which decide what can be quantised, are worked
    out for every plan (milliseconds).

    >>> foresight = Foresight(model)
    >>> foresight(plan_pruning(dependencies, scores, ratio=0.25))["transformers"].verdict
    'yes'

    Args:
        model: the dense model; only its class, configuration and shapes are read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._skeleton: Any = meta_copy(model)
        self._known: dict[Hashable, Compatibility] = {}

    def knows(self, plan: PruningPlan) -> bool:
        """True where the answer comes at once."""
        return _pattern(plan) in self._known

    def __call__(self, plan: PruningPlan) -> Compatibility:
        """What will open the model that ``prune`` would return.

        Args:
            plan: made for this model.
        """
        if not isinstance(self._skeleton, PreTrainedModel):
            return Compatibility((Answer("transformers", "no", "it is no model of transformers"),))
        pattern = _pattern(plan)
        if pattern not in self._known:
            self._known[pattern] = self._tried(plan)
        found = self._known[pattern]
        fresh = answers_by_rows(self._row_lengths(plan, found), found["llama.cpp"].opens)
        by_name = {answer.program: answer for answer in fresh}
        return replace(found, answers=tuple(by_name.get(a.program, a) for a in found.answers))

    def _tried(self, plan: PruningPlan) -> Compatibility:
        """By the configuration that says the cut; where there is none, by the cut itself."""
        if not plan.removal and not plan.dropped:
            return compatibility(self._skeleton)
        found: Any = None
        if not plan.dropped:
            trial = sliced_copy(self._skeleton, plan)
            blueprints = find_blueprint(self._skeleton, plan, shapes_of(trial))
            found = None if blueprints is None else blueprints[1].model
        if found is None:
            found = prune(self._skeleton, plan)
        return compatibility(found)

    def _row_lengths(self, plan: PruningPlan, found: Compatibility) -> dict[str, set[int]]:
        outside = {*plan.dependencies.aliases, *plan.dependencies.buffers}
        matrices = {
            name: shape[-1]
            for name, shape in plan.new_shapes().items()
            if len(shape) == 2 and name not in outside
        }
        if not found["llama.cpp"].opens or self._skeleton.config.model_type not in DIALECTS:
            return {"columns of weights": set(matrices.values())}
        return {
            what: {length for name, length in matrices.items() if name.endswith(ending)}
            for what, ending in _ROWS.items()
        }


def _pattern(plan: PruningPlan) -> Hashable:
    """What decides whether a configuration can say the cut; plans of one pattern get one answer.

    Of neurons only whether the layers keep equally many. Of other kinds also how many: heads must divide
    the residual width in some configurations.
    """
    return tuple(_by_kind(plan)), plan.dropped


def _by_kind(plan: PruningPlan) -> Iterator[tuple[str, object]]:
    dropped = tuple(f"{unit}." for unit in plan.dropped)
    for kind in dict.fromkeys(plan.dependencies.family(name).kind for name in plan.removal):
        kept = {
            family.size - len(plan.removal.get(family.name, ()))
            for family in plan.dependencies.select(kind=kind)
            if not family.name.startswith(dropped)
        }
        alike = len(kept) == 1
        yield kind, (alike and (kind == "mlp_neuron" or min(kept)))
