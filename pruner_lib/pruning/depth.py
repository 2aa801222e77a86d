"""Depth: which layers, attentions or MLPs matter least, and a model without them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.discovery.families import whole_number
from pruner_lib.importance.calibration import (
    check_batches,
    default_size,
    memory_advice,
    micro_batches,
    untouched,
)
from pruner_lib.importance.layers import MEASURES, loss_without, score_layers, units_by_path
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.surgery import prune

METHODS = (*MEASURES, "greedy")


@dataclass(frozen=True)
class DropStep:
    """One step of :func:`drop_greedily`.

    Attributes:
        unit: what went, besides what went before.
        loss: mean cross-entropy without all of them, nats per token.
    """

    unit: str
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def drop_greedily(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor,
    count: int,
    *,
    unit: str | Iterable[str] = "block",
    micro_batch_size: int | None = None,
) -> tuple[DropStep, ...]:
    """Drop, one after another, the unit whose absence raises the loss least, given those already gone.

    A layer that matters little alone may matter once its neighbour is gone; this sees it. It takes about
    ``count`` × units forward passes, where :func:`score_layers` takes one.

    Args:
        model: a causal language model; comes back as it was.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]``.
        count: units to drop; one inside a layer that goes later counts with that layer.
        unit: as in :func:`score_layers`.
        micro_batch_size: sequences run at once; None for about 2048 tokens.

    Returns:
        The units in the order in which they went, with the loss after each.

    Raises:
        ValueError: a count below 1 or so large that nothing stays; unusable batches; an unknown unit.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.

    Source: one-shot removal by perplexity, Shortened LLaMA (arXiv 2402.02834); repeated here.
    """
    units = units_by_path(dependencies, unit)
    _check_count(count, len(units))
    batches = check_batches(model, batches)
    pieces = micro_batches(batches, default_size(batches) if micro_batch_size is None else micro_batch_size)
    steps: list[DropStep] = []
    with untouched(model), memory_advice(batches):
        while len(_apart(gone := [step.unit for step in steps])) < count:
            left = [name for name in units if _may_go(name, gone, dependencies.num_layers)]
            if not left:
                raise ValueError(_too_few(gone))
            losses = {name: loss_without(model, units, [*gone, name], pieces) for name in left}
            best = min(losses, key=lambda name: losses[name])
            steps.append(DropStep(best, losses[best]))
    return tuple(steps)


def plan_layers(
    model: nn.Module,
    drop: str | int | Iterable[str | int] | None = None,
    *,
    count: int | None = None,
    batches: Tensor | None = None,
    unit: str | Iterable[str] = "block",
    method: str = "influence",
    micro_batch_size: int | None = None,
    dependencies: DependencyMap | None = None,
) -> PruningPlan:
    """A plan that drops whole layers or sublayers; arguments as for :func:`prune_layers`."""
    found = discover(model) if dependencies is None else dependencies
    if (drop is None) == (count is None):
        raise ValueError("give either drop, the layers that go, or count, how many; not both")
    _check("method", method, METHODS)
    if drop is not None:
        return PruningPlan.from_removal(found, {}, dropped=_units_named(drop))
    if batches is None or count is None:
        raise ValueError(
            f"method {method!r} looks at text: give batches, token ids [N, L] (load_calibration)"
        )
    if method == "greedy":
        steps = drop_greedily(model, found, batches, count, unit=unit, micro_batch_size=micro_batch_size)
        return PruningPlan.from_removal(found, {}, dropped=[step.unit for step in steps])
    scores = score_layers(model, found, batches, unit=unit, measure=method, micro_batch_size=micro_batch_size)
    _check_count(count, len(list(scores)))
    gone: list[str] = []
    for name in sorted(scores, key=lambda name: float(scores[name])):
        if len(_apart(gone)) < count and _may_go(name, gone, found.num_layers):
            gone.append(name)
    if len(_apart(gone)) < count:
        raise ValueError(_too_few(gone))
    return PruningPlan.from_removal(found, {}, dropped=gone)


def prune_layers(
    model: nn.Module,
    drop: str | int | Iterable[str | int] | None = None,
    *,
    count: int | None = None,
    batches: Tensor | None = None,
    unit: str | Iterable[str] = "block",
    method: str = "influence",
    micro_batch_size: int | None = None,
    dependencies: DependencyMap | None = None,
) -> nn.Module:
    """The model without some of its layers, or without the attention or MLP of some.

    A dropped layer hands its input on. The result is an ordinary, shorter model: ``num_hidden_layers`` and
    the lists of the configuration follow, and plain ``from_pretrained`` opens what ``save_pruned`` writes.
    A dropped sublayer is a gap that transformers alone cannot build: what ``save_pruned`` writes opens once
    ``pruner_lib`` is imported, and raises without it.

    Example:
        >>> shorter = prune_layers(model, [20, 21])                       # these two
        >>> shorter = prune_layers(model, count=6, batches=batches)       # the six of least influence
        >>> thinner = prune_layers(model, ["layers.9.attention"])

    Args:
        model: left as it is.
        drop: numbers of layers, or names of units; or give ``count``.
        count: how many units go; one inside a layer that goes, too, counts with that layer.
        batches: token ids ``[N, L]`` that choose them.
        unit: ``"block"``, ``"attention"`` or ``"mlp"``, or several.
        method: ``"influence"``, ``"loss"`` (each alone) or ``"greedy"`` (the loss, one after another).
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        dependencies: what ``discover`` found in the model, if it is at hand.

    Returns:
        A new model.

    Raises:
        ValueError: an unknown unit or method, every layer, both or neither of ``drop`` and ``count``.
        MemoryError: the device ran out of memory over the batches.
        PruningError: the configuration has no way to say which layers stay, or the layers compute
            something else once they are renumbered.
    """
    plan = plan_layers(
        model,
        drop,
        count=count,
        batches=batches,
        unit=unit,
        method=method,
        micro_batch_size=micro_batch_size,
        dependencies=dependencies,
    )
    return prune(model, plan)


def _units_named(drop: str | int | Iterable[str | int]) -> list[str]:
    """Names of the units that go; a number is that of a layer."""
    one = isinstance(drop, str) or not isinstance(drop, Iterable) or whole_number(drop) is not None
    names = []
    for part in [drop] if one else list(drop):  # type: ignore[arg-type]
        number = whole_number(part)
        if number is None and not isinstance(part, str):
            raise ValueError(
                "drop takes numbers of layers and names of units, such as [20, 21] or "
                f"['layers.9.attention'], not {part!r}"
            )
        names.append(str(part) if number is None else f"layers.{number}")
    return names


def _check(label: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {label} {value!r}; valid are {', '.join(valid)}")


def _check_count(count: int, available: int) -> None:
    if whole_number(count) is None or not 0 < count < available:
        raise ValueError(
            f"count {count!r}: the model has {available} such units and one must stay; "
            f"give 1 to {available - 1}"
        )


def _apart(units: list[str]) -> list[str]:
    """Units without those inside layers that go whole."""
    return [unit for unit in units if unit.rpartition(".")[0] not in units]


def _may_go(name: str, gone: list[str], num_layers: int) -> bool:
    """True unless a unit has gone, or its layer has, or no layer would stay."""
    layers = sum(unit.count(".") == 1 for unit in gone)
    last = name.count(".") == 1 and layers == num_layers - 1
    return name not in gone and name.rpartition(".")[0] not in gone and not last


def _too_few(gone: list[str]) -> str:
    return f"only {len(_apart(gone))} units can go: what is left lies inside them, or no layer would stay"
