"""The study's figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pruner_lib.importance.study_report import (
    KINDS,
    MEASURES,
    VIEWS,
    Estimates,
    Key,
    Truth,
    Verdict,
    Verdicts,
    correlations,
    shown_criteria,
)

if TYPE_CHECKING:
    from pruner_lib.importance.study import Study


def draw_criteria(found: Verdicts) -> Any:
    """Every criterion × reduction as a row, one panel per way of judging, one marker per kind."""
    from pruner_lib.display.style import COLOURS, GREY, MARKERS, new_figure, tidy

    keys = list(next(iter(found.values())))
    figure, panels = new_figure(10, 1.4 + 0.19 * len(keys), nrows=1, ncols=len(MEASURES), sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for place, (kind, graded) in enumerate(found.items()):
            values = [measure.value(graded[key]) for key in keys]
            style = {"c": COLOURS[place], "marker": MARKERS[place], "s": 22}
            axes.scatter(values, range(len(keys)), label=KINDS[kind], **style)
        if measure.rising:
            axes.axvline(0, color=GREY, linewidth=1, zorder=0)
        else:  # from hundredths to several nats, and a few below zero
            axes.set_xscale("symlog", linthresh=0.01)
        axes.grid(axis="y", linewidth=0.4)
        tidy(axes, xlabel=measure.words if measure.rising else f"{measure.words} (nats)")
    panels[0].set_yticks(range(len(keys)), [", ".join(key) for key in keys], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].margins(y=0.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return figure


def draw_samples(study: Study, estimates: Estimates, truth: Truth, graded: Mapping[Key, Verdict]) -> Any:
    """Spearman of neurons against the number of samples, a curve per criterion, a panel per view."""
    from pruner_lib.display.style import COLOURS, MARKERS, new_figure, tidy

    sizes = study.settings.sizes
    figure, panels = new_figure(10, 4, nrows=1, ncols=len(VIEWS))
    for axes, (view, words) in zip(panels, VIEWS.items(), strict=True):
        for place, key in enumerate(shown_criteria(graded)):
            means = [
                statistics.fmean(correlations(estimates.values(), str(size), key, truth, view))
                for size in sizes
            ]
            style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7]}
            axes.plot(sizes, means, label=", ".join(key), **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        samples = f"calibration samples of {study.settings.seq_len} tokens"
        tidy(axes, xlabel=samples, ylabel=f"Spearman of neurons with {words}")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
