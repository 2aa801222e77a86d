"""The study as a page: tables in Markdown, figures in SVG."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pruner_lib.assets.files import write_whole
from pruner_lib.importance.grading import overlap_of_lowest
from pruner_lib.importance.scores import spearman

if TYPE_CHECKING:
    from pruner_lib.importance.study import Study

KINDS = {"mlp_neuron": "neurons", "query_head": "query heads", "attention_head": "heads"}
RATIO = 0.25
DEFAULT = ("taylor_first", "sum")

Truth = Mapping[str, list[list[float]]]
Estimates = Mapping[tuple[str, int], Mapping[str, Any]]
Key = tuple[str, str]  # criterion, reduction


def judge(kind: str, estimate: Mapping[str, list[float]], truth: Truth) -> tuple[float, float]:
    """(Spearman, overlap of the lowest 25 %) of one kind: neurons per layer, then the mean; heads pooled.

    A layer has too few heads for a rank correlation of its own, so those of all layers are ranked
    together, which also asks whether scores compare across layers.
    """
    pairs = [
        (torch.tensor(estimate[name], dtype=torch.float64), torch.tensor(halves, dtype=torch.float64).mean(0))
        for name, halves in truth.items()
        if name.endswith(kind)
    ]
    if kind != "mlp_neuron":
        pairs = [(torch.cat([one for one, _ in pairs]), torch.cat([other for _, other in pairs]))]
    correlations = [spearman(one, other) for one, other in pairs]
    overlaps = [overlap_of_lowest(one, other, RATIO) for one, other in pairs]
    return statistics.fmean(correlations), statistics.fmean(overlaps)


def reliability(kind: str, truth: Truth) -> float:
    """What a perfect estimate would reach: ρ of the two halves, stepped up to the whole text.

    By Spearman and Brown's formula 2ρ / (1 + ρ), and its square root, since the estimate has no such noise.
    """
    halves = [
        torch.tensor(values, dtype=torch.float64) for name, values in truth.items() if name.endswith(kind)
    ]
    if kind != "mlp_neuron":
        halves = [torch.cat(halves, dim=1)]
    rho = statistics.fmean(spearman(first, second) for first, second in halves)
    return (max(0.0, 2 * rho / (1 + rho))) ** 0.5


def table(rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:], ""]


def _over(
    estimates: Estimates, size: str, key: Key, judged: Callable[[Mapping[str, list[float]]], float]
) -> list[float]:
    """One number per source and seed."""
    criterion, reduction = key
    return [judged(found[size][criterion][reduction]) for found in estimates.values()]


def keys_of(estimates: Estimates) -> list[Key]:
    """Every criterion × reduction, in the order measured."""
    found = next(iter(next(iter(estimates.values())).values()))
    return [(criterion, reduction) for criterion, reductions in found.items() for reduction in reductions]


def _grades(kind: str, truth: Truth, estimates: Estimates, size: str) -> dict[Key, list[float]]:
    """[Spearman, overlap] of every criterion × reduction, means over sources and seeds."""
    found = {}
    for criterion, reduction in keys_of(estimates):
        judged = [judge(kind, every[size][criterion][reduction], truth) for every in estimates.values()]
        found[criterion, reduction] = [statistics.fmean(part) for part in zip(*judged, strict=True)]
    return found


def write_report(study: Study, truth: Truth, estimates: Estimates, removals: Any, out: Path) -> Path:
    """Write ``study.md``, ``study_criteria.svg`` and ``study_samples.svg``, each whole or not at all.

    Args:
        study: what was measured.
        truth: from ``measure_truth``.
        estimates: (source, seed) to what ``measure_estimates`` gave.
        out: the folder, made if missing.

    Returns:
        The page.
    """
    settings = study.settings
    kinds = [kind for kind in KINDS if any(name.endswith(kind) for name in truth)]
    largest = str(settings.sizes[-1])
    grades = {kind: _grades(kind, truth, estimates, largest) for kind in kinds}
    out.mkdir(parents=True, exist_ok=True)
    lines = _setting_lines(study, truth, kinds)
    lines += _conclusion(grades)
    lines += _criteria_table(grades)
    lines += ["![Spearman of every criterion](study_criteria.svg)", ""]
    lines += _samples_table(study, estimates, truth)
    lines += ["![Spearman against the number of samples](study_samples.svg)", ""]
    write_whole(out / "study_criteria.svg", _svg(_draw_criteria(grades)))
    write_whole(out / "study_samples.svg", _svg(_draw_samples(study, estimates, truth, grades["mlp_neuron"])))
    lines += ["Made by `python -m pruner_lib.importance.study --out docs/importance`.", ""]
    return write_whole(out / "study.md", "\n".join(lines))


def _setting_lines(study: Study, truth: Truth, kinds: Iterable[str]) -> list[str]:
    settings = study.settings
    measured = {kind: sum(len(v[0]) for name, v in truth.items() if name.endswith(kind)) for kind in kinds}
    groups = ", ".join(f"{count} {KINDS[kind]}" for kind, count in measured.items())
    ceilings = ", ".join(f"{KINDS[kind]} {reliability(kind, truth):.2f}" for kind in kinds)
    layers, sources = ", ".join(map(str, settings.layers)), ", ".join(settings.sources)
    return [
        "# How right is each criterion?",
        "",
        f"{study.name}. Truth: {groups} zeroed one at a time ({settings.neurons} neurons sampled in each of "
        f"the layers {layers}, whose query heads are all zeroed too, and the heads of all layers), and the "
        f"change of the loss on {settings.truth_samples} × {settings.truth_seq_len} tokens of "
        f"{settings.truth_source} ({settings.truth_split}). Estimates: {sources} (train), seeds "
        f"{', '.join(map(str, settings.seeds))}, samples of {settings.seq_len} tokens. Neurons are graded "
        "within each layer and averaged; heads are ranked together over the layers. By chance Spearman is 0 "
        f"and the overlap {100 * RATIO:.0f} %; the noise of the truth itself lets a perfect estimate reach "
        f"a Spearman of about: {ceilings}.",
        "",
    ]


def _conclusion(grades: Mapping[str, Mapping[Key, list[float]]]) -> list[str]:
    """What the numbers say, the default's place included."""
    lines = ["## What it says", ""]
    for kind, graded in grades.items():
        order = sorted(graded, key=lambda key: -_rank_value(graded[key][0]))
        best, place = order[0], order.index(DEFAULT) + 1
        lines.append(
            f"- {KINDS[kind]}: best is {best[0]} with {best[1]} ({graded[best][0]:.2f}, overlap "
            f"{100 * graded[best][1]:.0f} %); the default, {DEFAULT[0]} with {DEFAULT[1]}, comes "
            f"{place} of {len(order)} ({graded[DEFAULT][0]:.2f}, {100 * graded[DEFAULT][1]:.0f} %)."
        )
    mean = {
        key: statistics.fmean(_rank_value(g[key][0]) for g in grades.values()) for key in grades["mlp_neuron"]
    }
    best = max(mean, key=mean.__getitem__)
    return [
        *lines,
        f"- Over all kinds alike, best is {best[0]} with {best[1]} (mean Spearman {mean[best]:.2f}); the "
        f"default has {mean[DEFAULT]:.2f}.",
        "",
    ]


def _rank_value(rho: float) -> float:
    """NaN, of constant scores, as no correlation."""
    return rho if rho == rho else 0.0


def _criteria_table(grades: Mapping[str, Mapping[Key, list[float]]]) -> list[str]:
    head = ["criterion", "reduction"]
    for kind in grades:
        head += [f"{KINDS[kind]}: Spearman", "overlap"]
    rows = [head]
    for key in next(iter(grades.values())):
        row = list(key)
        for graded in grades.values():
            row += [f"{graded[key][0]:.2f}", f"{100 * graded[key][1]:.0f} %"]
        rows.append(row)
    return [
        "## Every criterion × reduction, at the largest sample, mean over sources and seeds",
        "",
        *table(rows),
    ]


def shown_criteria(graded: Mapping[Key, list[float]]) -> list[Key]:
    """Each criterion that reads text, with its best reduction for neurons."""
    best: dict[str, Key] = {}
    for key in graded:
        old = best.get(key[0])
        if old is None or _rank_value(graded[key][0]) > _rank_value(graded[old][0]):
            best[key[0]] = key
    return [key for name, key in best.items() if name not in ("random", "l1", "l2")]


def _samples_table(study: Study, estimates: Estimates, truth: Truth) -> list[str]:
    sizes = [str(size) for size in study.settings.sizes]
    rows = [["source", *(f"{size} samples" for size in sizes)]]
    for source in study.settings.sources:
        mine = {key: found for key, found in estimates.items() if key[0] == source}
        row = [source]
        for size in sizes:
            rhos = _over(mine, size, DEFAULT, lambda estimate: judge("mlp_neuron", estimate, truth)[0])
            row.append(f"{statistics.fmean(rhos):.2f} ({min(rhos):.2f}–{max(rhos):.2f})")
        rows.append(row)
    title = (
        f"## {DEFAULT[0]} with {DEFAULT[1]} by source and number of samples: neurons, Spearman (seeds' range)"
    )
    return [title, "", *table(rows)]


def _draw_criteria(grades: Mapping[str, Mapping[Key, list[float]]]) -> Any:
    from pruner_lib.display.style import COLOURS, MARKERS, new_figure, tidy

    keys = list(next(iter(grades.values())))
    figure, axes = new_figure(7.5, 1.2 + 0.2 * len(keys))
    for place, (kind, graded) in enumerate(grades.items()):
        values = [_rank_value(graded[key][0]) for key in keys]
        axes.scatter(values, range(len(keys)), c=COLOURS[place], marker=MARKERS[place], label=KINDS[kind])
    axes.set_yticks(
        range(len(keys)), [f"{criterion}, {reduction}" for criterion, reduction in keys], fontsize=8
    )
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.4)
    tidy(axes, xlabel="Spearman against the measured loss change")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _draw_samples(study: Study, estimates: Estimates, truth: Truth, graded: Mapping[Key, list[float]]) -> Any:
    from pruner_lib.display.style import COLOURS, MARKERS, new_figure, tidy

    sizes = study.settings.sizes
    figure, axes = new_figure(7.5, 4)
    for place, key in enumerate(shown_criteria(graded)):
        means = [
            statistics.fmean(
                _over(estimates, str(size), key, lambda estimate: judge("mlp_neuron", estimate, truth)[0])
            )
            for size in sizes
        ]
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7]}
        axes.plot(sizes, means, label=f"{key[0]}, {key[1]}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    tidy(axes, xlabel=f"calibration samples of {study.settings.seq_len} tokens", ylabel="Spearman, neurons")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _svg(figure: Any) -> str:
    """The figure as SVG text, the same for the same numbers."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pruner_lib", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
