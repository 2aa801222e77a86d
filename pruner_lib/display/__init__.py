"""Plots and widgets, without logic of their own.

Every plot returns a figure that a cell shows by returning it; every plot has a companion that says in
one line what it shows, without times or machine facts, so that a checked cell may print it.

    draw_family(dependencies, family, groups=0)                 describe_family(the same)
    plot_importance(scores, *, kind=None)                       describe_importance(the same)
    plot_sorted_scores({name: scores}, family)                  describe_sorted_scores(the same)
    plot_score_histogram(scores, *, kind=None)                  describe_score_histogram(the same)
    plot_ranks(first, second, family, *, ratio=0.25)            describe_ranks(the same)
    plot_criteria({name: perplexity}, *, dense=None)            describe_criteria(the same)
    plot_plan(plan)                                             describe_plan(plan)
    plot_sensitivity(scan)                                      describe_sensitivity(scan)
    plot_learning_curve(history or {name: history})             describe_learning_curve(the same)
    plot_recovery(history)                                      describe_recovery(history)
    plot_tradeoff(report or {name: (size, quality)})            describe_tradeoff(the same)
    plot_latency(table)                                         describe_latency(the same)

Widgets are boxes whose controls are attributes; end a cell with ``display(widget)``:

    group_explorer(dependencies)                                .kind .layer .index .why
    criteria_explorer({name: scores}, *, truth=…, estimate=…)   .first .second .family .ratio
    plan_explorer(model, dependencies, scores)                  .goal .amount .scope .layers .kinds .round_to
                                                                .uniform → .plan .cost .formats
    generation_bench({name: model}, tokenizer, *, prompt=…)     .prompt .max_new_tokens .button .stop
    evaluation_dashboard(report)                                .quality .size .numbers .models
    recovery_monitor()                                          .stop; await monitor.run(recover, …)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pruner_lib.display.coupling import describe_family, draw_family
from pruner_lib.display.importance import (
    describe_importance,
    describe_ranks,
    describe_score_histogram,
    describe_sorted_scores,
    lowest_overlap,
    plot_importance,
    plot_ranks,
    plot_score_histogram,
    plot_sorted_scores,
)
from pruner_lib.display.plan_cost import PlanCost
from pruner_lib.display.plans import describe_plan, describe_sensitivity, plot_plan, plot_sensitivity
from pruner_lib.display.results import (
    describe_criteria,
    describe_latency,
    describe_learning_curve,
    describe_tradeoff,
    plot_criteria,
    plot_latency,
    plot_learning_curve,
    plot_tradeoff,
)

if TYPE_CHECKING:
    from pruner_lib.display.recovery import describe_recovery, plot_recovery, recovery_monitor
    from pruner_lib.display.widgets import (
        criteria_explorer,
        evaluation_dashboard,
        generation_bench,
        group_explorer,
        plan_explorer,
    )

_WIDGETS = (
    "criteria_explorer", "evaluation_dashboard", "generation_bench", "group_explorer", "plan_explorer",
)  # fmt: skip
_RECOVERY = ("describe_recovery", "plot_recovery", "recovery_monitor")

__all__ = [
    "PlanCost",
    "criteria_explorer",
    "describe_criteria",
    "describe_family",
    "describe_importance",
    "describe_latency",
    "describe_learning_curve",
    "describe_plan",
    "describe_ranks",
    "describe_recovery",
    "describe_score_histogram",
    "describe_sensitivity",
    "describe_sorted_scores",
    "describe_tradeoff",
    "draw_family",
    "evaluation_dashboard",
    "generation_bench",
    "group_explorer",
    "lowest_overlap",
    "plan_explorer",
    "plot_criteria",
    "plot_importance",
    "plot_latency",
    "plot_learning_curve",
    "plot_plan",
    "plot_ranks",
    "plot_recovery",
    "plot_score_histogram",
    "plot_sensitivity",
    "plot_sorted_scores",
    "plot_tradeoff",
    "recovery_monitor",
]


def __getattr__(name: str) -> Any:
    """Widgets on first use, so that figures need no ipywidgets."""
    if name in _WIDGETS:
        from pruner_lib.display import widgets

        return getattr(widgets, name)
    if name in _RECOVERY:
        from pruner_lib.display import recovery

        return getattr(recovery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
