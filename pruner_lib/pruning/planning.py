"""From scores to a plan: which groups and layers to remove for a ratio or a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pruner_lib.discovery.families import KINDS
from pruner_lib.discovery.units import UNITS, units_of_kind
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.pruning.budgets import Budget, Search
from pruner_lib.pruning.ladders import Ladder, Scores, columns_of, depth_ladder, family_ladder
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.presets import PRESETS, Preset
from pruner_lib.pruning.ranking import GlobalRanking
from pruner_lib.pruning.selection import (
    Limits,
    Per,
    chosen_layers,
    families_of_kind,
    known,
)

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

SCOPES = ("local", "global")


def plan_pruning(
    dependencies: DependencyMap,
    scores: Scores,
    *,
    ratio: float | Mapping[str, float] | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    target_bytes: float | None = None,
    scope: str | None = None,
    layers: int | Iterable[int] | None = None,
    kinds: str | Iterable[str] | None = None,
    round_to: Per = 1,
    minimum: Per = 1,
    protect: int | Iterable[int] = (),
    uniform: bool = False,
    ranking: GlobalRanking | None = None,
    preset: str | Preset | None = None,
) -> PruningPlan:
    """Remove the lowest-scored groups of the selected families, and the lowest-scored layers.

    **Local scope.** Every family loses the same share. Of n groups, ``ratio`` r removes r·n rounded to the
    nearest whole number, halves upwards, and always leaves one: 3 KV heads at 0.25 lose 1 (0.75), 1536
    neurons lose 384. Query heads go in equal numbers from every KV group. Ties go to the lower index.
    A target takes the largest common ratio that leaves too much, then lets family after family go to the
    next ratio (the dearest groups first), then removes single groups of the cheapest kind.

    **Global scope.** One ranking across all families, see :class:`GlobalRanking`: the lowest values go
    until the target is met. A ``ratio`` stands for the parameters that the local plan of that ratio
    would leave, so that the two scopes can be compared at one size.

    What a plan leaves under a target is at most the target, and less than one group of the cheapest kind
    below it, as long as that kind has groups left to give (with ``uniform``, one group in each layer;
    with ``round_to``, so many groups).

    **Depth.** The kinds ``"block"``, ``"attention"`` and ``"mlp"`` are layers and sublayers dropped whole.
    All of a kind are one family, with one score per unit under the unit's name (``"layers.5"``,
    ``"layers.5.mlp"``), as ``score_layers`` gives them; they may be mixed with any other kinds.

    Example:
        >>> plan_pruning(dependencies, scores, ratio=0.25, layers=range(4, 27))
        >>> plan_pruning(dependencies, scores, target_params=0.8, kinds="mlp_neuron", uniform=True)
        >>> both = {**scores.scores, **score_layers(model, dependencies, batches).scores}
        >>> plan_pruning(dependencies, both, target_macs=0.7, scope="global", kinds=("mlp_neuron", "block"))

    Args:
        dependencies: what ``discover`` found in the model.
        scores: one tensor ``[size]`` for every selected family, and ``[1]`` for every unit of depth.
        ratio: share of groups removed from each family, in [0, 1); one for all kinds, or one per kind.
        target_params: parameters to be left at most; up to 1 is a share of the dense model, above
            1 a count. Give one of the targets or ``ratio``.
        target_macs: the same in multiply-accumulates at 1 × 64 tokens.
        target_bytes: the same in bytes of weights.
        scope: ``"local"`` (if not given) or ``"global"``.
        layers: decoder layers, counted from 0; None for all families of the kinds.
        kinds: which kinds to prune; if not given, ``("attention_head", "mlp_neuron")``.
        round_to: the groups left in a family that loses any are a multiple of this; a number for
            all kinds of groups, or a number per kind.
        minimum: the fewest groups that stay in a family, and layers of those that may go; a number for all
            kinds, or per kind.
        protect: layers that are left alone.
        uniform: every layer keeps the same width, so that plain ``from_pretrained`` opens the result.
        ranking: for the global scope.
        preset: a name of ``PRESETS``, or a ``Preset``: scope, kinds and ranking where they are not given.

    Returns:
        The plan; nothing is cut yet.

    Raises:
        ValueError: none or several of ratio and targets, or one out of its range, or a ratio for a kind
            that is not pruned; an unknown scope, kind, layer or preset; a kind that this model has not, or
            only blocked; a ``round_to`` or ``minimum`` that cannot be met; ``uniform`` with only some of
            the layers; missing or unusable scores; a target that cannot be reached, or, in the global
            scope, a ratio below the floors.
        PruningError: ``target_macs`` for a model that cannot be traced.

    Source: local ratios, LLM-Pruner, arXiv 2305.11627, section 3.3.
    """
    _check_given(dependencies, scores)
    chosen = resolved(preset, scope, kinds, ranking)
    budget = Budget.of(ratio, params=target_params, macs=target_macs, weight_bytes=target_bytes)
    _check_ratio_kinds(ratio, chosen.kinds)
    places = chosen_layers(dependencies, layers, protect)
    if uniform and places is not None:
        raise ValueError(
            "uniform=True keeps one width in every layer, but layers or protect leaves some of them alone; "
            "give one or the other"
        )
    ladders = ladders_of(dependencies, scores, chosen, places, Limits(round_to, minimum))
    return solved(Search(dependencies, columns_of(ladders, uniform=uniform), budget), chosen)


def solved(search: Search, chosen: Preset) -> PruningPlan:
    """The plan that a search finds, in the scope that was chosen."""
    return search.plan(search.by_rank(chosen.ranking) if chosen.scope == "global" else search.evenly())


def _check_given(dependencies: object, scores: object) -> None:
    from pruner_lib.discovery import DependencyMap

    if not isinstance(dependencies, DependencyMap):
        raise TypeError(f"plan_pruning wants what discover(model) found, not a {type(dependencies).__name__}")
    if not isinstance(scores, Mapping | ImportanceScores):
        raise TypeError(
            f"plan_pruning wants scores (estimate_importance, or a tensor per family), "
            f"not a {type(scores).__name__}"
        )


def _check_ratio_kinds(ratio: float | Mapping[str, float] | None, kinds: Iterable[str]) -> None:
    """Refuse a ratio for a kind that would not be pruned."""
    others = [kind for kind in ratio if kind not in kinds] if isinstance(ratio, Mapping) else []
    if others:
        raise ValueError(
            f"ratio names {', '.join(others)}, but the kinds to prune are {', '.join(kinds)}; name the same "
            "in kinds="
        )


def resolved(
    preset: str | Preset | None,
    scope: str | None,
    kinds: str | Iterable[str] | None,
    ranking: GlobalRanking | None,
) -> Preset:
    """Scope, kinds and ranking: as given, else the preset's, else the defaults."""
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; valid are {', '.join(PRESETS)}")
    base = PRESETS[preset] if isinstance(preset, str) else preset or Preset()
    chosen = Preset(
        scope=base.scope if scope is None else scope,
        kinds=base.kinds if kinds is None else kinds,  # type: ignore[arg-type]
        ranking=base.ranking if ranking is None else ranking,
    )
    if chosen.scope not in SCOPES:
        raise ValueError(
            f"unknown scope {chosen.scope!r}; valid is 'local': every family loses the same share, or "
            "'global': one ranking across all families"
        )
    if ranking is not None and chosen.scope != "global":
        raise ValueError("a ranking compares families, which only scope='global' does; give both or neither")
    return chosen


def ladders_of(
    dependencies: DependencyMap, scores: Scores, chosen: Preset, layers: list[int] | None, limits: Limits
) -> list[Ladder]:
    """A ladder for everything of the chosen kinds in the layers, with the floors of a global ranking.

    Raises:
        ValueError: a kind that is unknown or not there, unusable scores, a limit that cannot be met.
    """
    ladders: list[Ladder] = []
    known(chosen.kinds, "kinds")
    for kind in (kind for kind in (*KINDS, *UNITS) if kind in chosen.kinds):  # ties never hang on their order
        if kind in UNITS:
            ladders.append(depth_ladder(kind, units_of_kind(dependencies, kind, layers), scores, limits))
        else:
            families = families_of_kind(dependencies, kind, layers)
            ladders += [family_ladder(family, scores, limits) for family in families]
    if chosen.scope == "global":
        ladders = [dataclasses.replace(ladder, floor=chosen.ranking.least(ladder)) for ladder in ladders]
    return ladders


__all__ = ["GlobalRanking", "plan_pruning"]
