"""Scores drawn: heat maps, sorted curves, histograms, two criteria against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pruner_lib.display.style import COLOURS, INK, MARKERS, kind_of, layer_of, new_figure, tidy
from pruner_lib.importance import ImportanceScores
from pruner_lib.importance.grading import overlap_of_lowest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDEST = 96  # columns of a heat map; families with more groups are drawn as means of neighbours in rank


def kinds_scored(scores: ImportanceScores) -> tuple[str, ...]:
    """Kinds of the families that have scores, in their order."""
    return tuple(dict.fromkeys(kind_of(name) for name in scores))


def plot_importance(scores: ImportanceScores, *, kind: str | None = None) -> Figure:
    """A heat map, layers × groups, of one kind of family.

    Colour is log10 of the score over the mean score of all layers. Families of more than 96 groups
    are sorted within each layer and averaged over neighbours in rank.

    Args:
        scores: of families with a layer.
        kind: which kind; the last one scored if None.
    """
    kind = kind or kinds_scored(scores)[-1]
    table, names, ordered = _table(scores, kind)
    figure, axes = new_figure(7.5, 1.2 + 0.14 * max(12, len(names)))
    image = axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest")
    ticks = range(0, len(names), max(1, len(names) // 8))
    axes.set_yticks(list(ticks), [str(layer_of(names[t])) for t in ticks])
    across = "groups of each layer, most important first" if ordered else "group"
    if ordered:
        axes.set_xticks([0, table.shape[1] - 1], ["first", "last"])
    else:
        axes.set_xticks(range(table.shape[1]))
    tidy(axes, title=f"{kind}, {scores.criterion or 'given scores'}", xlabel=across, ylabel="layer")
    figure.colorbar(image, label="log10(score / mean score)")
    return figure


def describe_importance(scores: ImportanceScores, *, kind: str | None = None) -> str:
    """What :func:`plot_importance` shows, in one line."""
    kind = kind or kinds_scored(scores)[-1]
    means = {name: float(scores[name].mean()) for name in scores if kind_of(name) == kind}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return (
        f"{kind} by {scores.criterion or 'given scores'}: on average least important in layer "
        f"{layer_of(low)}, most important in layer {layer_of(high)}."
    )


def _table(scores: ImportanceScores, kind: str) -> tuple[np.ndarray, list[str], bool]:
    """log10 of relative scores ``[layers, columns]``, names of the rows, and whether they are sorted."""
    names = [name for name in scores if kind_of(name) == kind]
    if not names:
        raise ValueError(f"no scores of kind {kind!r}; there are {', '.join(kinds_scored(scores))}")
    rows = [np.abs(scores[name].double().numpy()) for name in names]
    width = min(min(map(len, rows)), _WIDEST)
    ordered = max(map(len, rows)) > width
    if ordered:
        rows = [np.array([part.mean() for part in np.array_split(np.sort(row)[::-1], width)]) for row in rows]
    table = np.stack(rows)
    smallest = table[table > 0].min(initial=np.inf)
    relative = np.maximum(table, smallest) / table.mean() if np.isfinite(smallest) else np.ones_like(table)
    return np.log10(relative), names, ordered


def plot_sorted_scores(scores: Mapping[str, ImportanceScores], family: str) -> Figure:
    """Scores of one family, sorted from the highest down, one curve per criterion, each over its mean.

    Args:
        scores: name of the curve to scores.
        family: name of the family.
    """
    figure, axes = new_figure(7, 3.6)
    for place, (name, values) in enumerate(scores.items()):
        sorted_values = np.sort(values[family].double().numpy())[::-1]
        mean = np.abs(sorted_values).mean() or 1.0
        share = np.linspace(0, 100, len(sorted_values))
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7], "markersize": 5}
        axes.plot(share, sorted_values / mean, label=name, markevery=max(1, len(share) // 12), **style)
    axes.set_yscale("symlog", linthresh=0.01)
    tidy(axes, title=family, xlabel="share of groups, highest first (%)", ylabel="score / mean |score|")
    axes.legend(frameon=False)
    return figure


def describe_sorted_scores(scores: Mapping[str, ImportanceScores], family: str) -> str:
    """What :func:`plot_sorted_scores` shows, in one line: how much of the total the top tenth holds."""
    parts = []
    for name, values in scores.items():
        falling = np.sort(np.abs(values[family].double().numpy()))[::-1]
        top = falling[: max(1, len(falling) // 10)].sum() / (falling.sum() or 1.0)
        parts.append(f"{name} {100 * top:.0f} %")
    return f"{family}, share of the total score held by the highest tenth of groups: {', '.join(parts)}."


def lowest_overlap(first: ImportanceScores, second: ImportanceScores, family: str, ratio: float) -> float:
    """Share of groups that both would remove at a ratio; by chance it is the ratio itself."""
    return overlap_of_lowest(first[family], second[family], ratio)


def plot_score_histogram(scores: ImportanceScores, *, kind: str | None = None) -> Figure:
    """How the scores of one kind are spread: groups per bin of log10 of the score over its layer's mean.

    Scores that are zero or below have no logarithm and are left out; the companion says how many.

    Args:
        scores: of one model.
        kind: which kind; the last one scored if None.
    """
    kind = kind or kinds_scored(scores)[-1]
    relative, _ = _relative(scores, kind)
    figure, axes = new_figure(6, 3.4)
    axes.hist(np.log10(relative), bins=40, color=COLOURS[0], edgecolor="white", linewidth=0.4)
    title = f"{kind}, {scores.criterion or 'given scores'}"
    tidy(axes, title=title, xlabel="log10(score / mean score of its layer)", ylabel="groups")
    return figure


def describe_score_histogram(scores: ImportanceScores, *, kind: str | None = None) -> str:
    """What :func:`plot_score_histogram` shows, in one line."""
    kind = kind or kinds_scored(scores)[-1]
    relative, left_out = _relative(scores, kind)
    below = 100 * float((relative < 1).mean()) if len(relative) else 0.0
    without = f"; {left_out} groups with a score of zero or below are left out" if left_out else ""
    return (
        f"{kind} by {scores.criterion or 'given scores'}: {below:.0f} % of {len(relative)} groups score "
        f"below the mean of their layer{without}."
    )


def _relative(scores: ImportanceScores, kind: str) -> tuple[np.ndarray, int]:
    """Positive scores of a kind over the mean of their family, and how many were not positive."""
    names = [name for name in scores if kind_of(name) == kind]
    if not names:
        raise ValueError(f"no scores of kind {kind!r}; there are {', '.join(kinds_scored(scores))}")
    parts, left_out = [], 0
    for name in names:
        values = scores[name].double().numpy()
        positive = values[values > 0]
        left_out += len(values) - len(positive)
        parts.append(positive / positive.mean() if len(positive) else positive)
    return np.concatenate(parts), left_out


def plot_ranks(
    first: ImportanceScores,
    second: ImportanceScores,
    family: str,
    *,
    ratio: float = 0.25,
    names: tuple[str, str] | None = None,
) -> Figure:
    """Rank of every group by one criterion against its rank by another; what both remove is marked.

    Args:
        first: along the horizontal axis.
        second: along the vertical axis.
        family: name of the family.
        ratio: share of groups that would go.
        names: what to call the two; their criteria if None.
    """
    ranks = [scores[family].argsort(stable=True).argsort().numpy() for scores in (first, second)]
    count = max(1, round(ratio * len(ranks[0])))
    gone = (ranks[0] < count) & (ranks[1] < count)
    figure, axes = new_figure(4.4, 4.2)
    for mask, colour, marker, label in (
        (~gone, COLOURS[4], "o", "other groups"),
        (gone, COLOURS[5], "X", "removed by both"),
    ):
        axes.scatter(ranks[0][mask], ranks[1][mask], s=14, c=colour, marker=marker, label=label, alpha=0.7)
    for line in (axes.axvline, axes.axhline):
        line(count - 0.5, color=INK, linewidth=0.8, linestyle="--")
    names = names or _names(first, second)
    tidy(axes, title=family, xlabel=f"rank by {names[0]}", ylabel=f"rank by {names[1]}")
    axes.legend(fontsize=8, loc="upper left", framealpha=0.95)
    return figure


def _names(first: ImportanceScores, second: ImportanceScores) -> tuple[str, str]:
    return first.criterion or "scores", second.criterion or "scores"


def describe_ranks(
    first: ImportanceScores,
    second: ImportanceScores,
    family: str,
    *,
    ratio: float = 0.25,
    names: tuple[str, str] | None = None,
) -> str:
    """What :func:`plot_ranks` shows, in one line."""
    names = names or _names(first, second)
    rho = first.rank_correlation(second)[family]
    overlap = lowest_overlap(first, second, family, ratio)
    return (
        f"{family}: Spearman {rho:.2f} between {names[0]} and {names[1]}; they agree on "
        f"{100 * overlap:.0f} % of the lowest {100 * ratio:.0f} %."
    )
