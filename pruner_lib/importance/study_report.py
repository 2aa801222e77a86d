"""The study as a page: tables in Markdown, figures in SVG."""

from __future__ import annotations

import inspect
import io
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pruner_lib.assets.files import write_whole
from pruner_lib.importance.estimate import estimate_importance
from pruner_lib.importance.grading import overlap_of_lowest
from pruner_lib.importance.scores import spearman

if TYPE_CHECKING:
    from pruner_lib.importance.study import Study

KINDS = {"mlp_neuron": "neurons", "query_head": "query heads", "attention_head": "heads"}
VIEWS = {"change": "the loss change", "size": "its size"}
_OPTIONS = inspect.signature(estimate_importance).parameters
DEFAULT = (str(_OPTIONS["criterion"].default), str(_OPTIONS["reduction"].default))

Truth = Mapping[str, list[list[float]]]
Estimates = Mapping[tuple[str, int], Mapping[str, Any]]
Removals = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
Key = tuple[str, str]  # criterion, reduction


@dataclass(frozen=True)
class Verdict:
    """How right one criterion × reduction is about one kind.

    Attributes:
        change: Spearman against the measured loss change, and the overlap of the lowest share; means
            over sources and seeds. A score is right here if it knows which groups *harm* the model.
        size: the same against the absolute loss change: whether it knows which groups *do* least.
        spread: standard deviation of both Spearmans over sources and seeds.
        rise: of the loss, when the lowest share goes at once; mean over the sources.
    """

    change: tuple[float, float]
    size: tuple[float, float]
    spread: tuple[float, float]
    rise: float


Verdicts = Mapping[str, Mapping[Key, Verdict]]  # kind → criterion × reduction


@dataclass(frozen=True)
class Measure:
    """A way of judging.

    Attributes:
        words: what it is called.
        value: of a verdict.
        rising: whether more is better.
    """

    words: str
    value: Callable[[Verdict], float]
    rising: bool = True


MEASURES = (
    Measure("Spearman with the loss change", lambda verdict: _number(verdict.change[0])),
    Measure("Spearman with its size", lambda verdict: _number(verdict.size[0])),
    Measure("loss rise, a share at once", lambda verdict: verdict.rise, rising=False),
)


def judge(kind: str, estimate: Mapping[str, list[float]], truth: Truth, view: str) -> tuple[float, float]:
    """(Spearman, overlap of the lowest) of one kind: neurons per layer, then the mean; heads pooled.

    A layer has too few heads for a rank correlation of its own, so those of all layers are ranked
    together, which also asks whether scores compare across layers.

    Args:
        kind: of family.
        estimate: family to scores of its measured groups.
        truth: family to loss changes on each half of the text.
        view: ``"change"``, with its sign, or ``"size"``, without.
    """
    pairs = [
        (
            torch.tensor(estimate[name], dtype=torch.float64),
            _seen(torch.tensor(halves).double().mean(0), view),
        )
        for name, halves in truth.items()
        if name.endswith(kind)
    ]
    if kind != "mlp_neuron":
        pairs = [(torch.cat([one for one, _ in pairs]), torch.cat([other for _, other in pairs]))]
    correlations = [spearman(one, other) for one, other in pairs]
    overlaps = [overlap_of_lowest(one, other, 0.25) for one, other in pairs]
    return statistics.fmean(correlations), statistics.fmean(overlaps)


def reliability(kind: str, truth: Truth, view: str) -> float:
    """What a perfect estimate would reach: ρ of the two halves, stepped up to the whole text.

    By Spearman and Brown's formula 2ρ / (1 + ρ), and its square root, since the estimate has no such noise.
    """
    halves = [
        _seen(torch.tensor(values).double(), view) for name, values in truth.items() if name.endswith(kind)
    ]
    if kind != "mlp_neuron":
        halves = [torch.cat(halves, dim=1)]
    rho = statistics.fmean(spearman(first, second) for first, second in halves)
    return (max(0.0, 2 * rho / (1 + rho))) ** 0.5


def _seen(changes: torch.Tensor, view: str) -> torch.Tensor:
    return changes.abs() if view == "size" else changes


def _number(rho: float) -> float:
    """NaN, of constant scores, as no correlation."""
    return rho if rho == rho else 0.0


def verdicts(
    kind: str, truth: Truth, estimates: Estimates, removals: Removals, size: str
) -> dict[Key, Verdict]:
    """Every criterion × reduction on one kind, in the order measured."""
    found = {}
    for key in keys_of(estimates):
        criterion, reduction = key
        judged = {
            view: [
                judge(kind, every[size][criterion][reduction], truth, view) for every in estimates.values()
            ]
            for view in VIEWS
        }
        means = {view: tuple(map(statistics.fmean, zip(*all_, strict=True))) for view, all_ in judged.items()}
        found[key] = Verdict(
            change=(means["change"][0], means["change"][1]),
            size=(means["size"][0], means["size"][1]),
            spread=(_spread(judged["change"]), _spread(judged["size"])),
            rise=statistics.fmean(source[criterion][reduction][kind] for source in removals.values()),
        )
    return found


def _spread(judged: Iterable[tuple[float, float]]) -> float:
    return statistics.pstdev([_number(rho) for rho, _ in judged])


def keys_of(estimates: Estimates) -> list[Key]:
    """Every criterion × reduction, in the order measured."""
    found = next(iter(next(iter(estimates.values())).values()))
    return [(criterion, reduction) for criterion, reductions in found.items() for reduction in reductions]


def table(rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:], ""]


def write_report(study: Study, truth: Truth, estimates: Estimates, removals: Removals, out: Path) -> Path:
    """Write ``study.md``, ``study_criteria.svg`` and ``study_samples.svg``, each whole or not at all.

    Args:
        study: what was measured.
        truth: from ``measure_truth``.
        estimates: (source, seed) to the scores that ``measure_estimates`` gave.
        removals: from ``measure_removals``.
        out: the folder, made if missing.

    Returns:
        The page.
    """
    from pruner_lib.importance.study_figures import draw_criteria, draw_samples

    kinds = [kind for kind in KINDS if any(name.endswith(kind) for name in truth)]
    largest = str(study.settings.sizes[-1])
    found = {kind: verdicts(kind, truth, estimates, removals, largest) for kind in kinds}
    out.mkdir(parents=True, exist_ok=True)
    lines = [*_setting_lines(study, truth, kinds), *_places(found)]
    lines += ["![Every criterion and reduction, three ways of judging](study_criteria.svg)", ""]
    lines += _samples_table(study, estimates, truth)
    lines += ["![Spearman against the number of samples](study_samples.svg)", ""]
    lines += [line for kind in kinds for line in _criteria_table(kind, found[kind], study)]
    write_whole(out / "study_criteria.svg", _svg(draw_criteria(found)))
    write_whole(out / "study_samples.svg", _svg(draw_samples(study, estimates, truth, found["mlp_neuron"])))
    lines += ["Made by `python -m pruner_lib.importance.study --out docs/importance`.", ""]
    return write_whole(out / "study.md", "\n".join(lines))


def _setting_lines(study: Study, truth: Truth, kinds: Iterable[str]) -> list[str]:
    settings = study.settings
    measured = {kind: sum(len(v[0]) for name, v in truth.items() if name.endswith(kind)) for kind in kinds}
    groups = ", ".join(f"{count} {KINDS[kind]}" for kind, count in measured.items())
    layers, sources = ", ".join(map(str, settings.layers)), ", ".join(settings.sources)
    ceilings = [["highest possible Spearman", *(KINDS[kind] for kind in kinds)]]
    for view, words in VIEWS.items():
        ceilings.append([f"with {words}", *(f"{reliability(kind, truth, view):.2f}" for kind in kinds)])
    return [
        "# How right is each criterion?",
        "",
        f"{study.name}. **Truth**: {groups} zeroed one at a time ({settings.neurons} neurons sampled in "
        f"each of the layers {layers}, whose query heads are all zeroed too, and the heads of all layers), "
        f"and the change of the loss on {settings.truth_samples} × {settings.truth_seq_len} tokens of "
        f"{settings.truth_source} ({settings.truth_split}). **Estimates**: {sources} (train), seeds "
        f"{', '.join(map(str, settings.seeds))}, samples of {settings.seq_len} tokens. Neurons are graded "
        "within each layer and averaged; heads are ranked together over the layers.",
        "",
        "Three questions are asked of each score. Does it know which groups *harm* the model (Spearman with "
        "the signed loss change)? Does it know which *do* least, for good or ill (Spearman with the size of "
        f"the change)? And what is lost when the lowest {100 * settings.ratio:.0f} % of every family of a "
        "kind in those layers go at once (loss rise in nats per token on half of the truth's text, mean over "
        f"{len(settings.sources)} draws), which is what pruning does? By chance Spearman is 0 and the "
        "overlap of the lowest 25 % is 25 %. The truth has noise of its own, seen by comparing its two "
        "halves; it lets a perfect estimate reach about:",
        "",
        *table(ceilings),
    ]


def _places(found: Verdicts) -> list[str]:
    """Who is best by which measure, where the default stands, and the best mean places over all."""
    rows = [["", "judged by", "best", "its value", f"default ({', '.join(DEFAULT)})", "its place"]]
    places: dict[Key, list[int]] = {}
    for kind, graded in found.items():
        for measure in MEASURES:
            values = {key: measure.value(verdict) for key, verdict in graded.items()}
            order = sorted(values, key=values.__getitem__, reverse=measure.rising)
            for place, key in enumerate(order, 1):
                places.setdefault(key, []).append(place)
            shown = [f"{values[key]:.3f}" for key in (order[0], DEFAULT)]
            standing = f"{order.index(DEFAULT) + 1} of {len(order)}"
            rows.append([KINDS[kind], measure.words, ", ".join(order[0]), *shown, standing])
    mean = {key: statistics.fmean(mine) for key, mine in places.items()}
    first = sorted(mean, key=mean.__getitem__)
    listed = "; ".join(f"{', '.join(key)} ({mean[key]:.1f})" for key in first[:5])
    return [
        "## Who is best",
        "",
        *table(rows),
        f"Mean place over these {len(rows) - 1} judgements, best first: {listed}. The default has "
        f"{mean[DEFAULT]:.1f}, which makes it number {first.index(DEFAULT) + 1} of {len(first)}.",
        "",
    ]


def _criteria_table(kind: str, graded: Mapping[Key, Verdict], study: Study) -> list[str]:
    quarter = f"loss rise, {100 * study.settings.ratio:.0f} % at once"
    head = ["criterion", "reduction"]
    for words in VIEWS.values():
        head += [f"{words}: Spearman", "overlap"]
    rows = [[*head, quarter]]
    for key, verdict in graded.items():
        row = list(key)
        for (rho, overlap), spread in zip((verdict.change, verdict.size), verdict.spread, strict=True):
            row += [f"{rho:.2f} ± {spread:.2f}", f"{100 * overlap:.0f} %"]
        rows.append([*row, f"{verdict.rise:.3f}"])
    name = KINDS[kind]
    title = f"## {name.capitalize()}: every criterion × reduction, {study.settings.sizes[-1]} samples"
    return [title, "", "Means over sources and seeds, ± their standard deviation.", "", *table(rows)]


def shown_criteria(graded: Mapping[Key, Verdict]) -> list[Key]:
    """Each criterion that reads text, with the reduction whose removal costs least."""
    best: dict[str, Key] = {}
    for key in graded:
        old = best.get(key[0])
        if old is None or graded[key].rise < graded[old].rise:
            best[key[0]] = key
    return [key for name, key in best.items() if name not in ("random", "l1", "l2")]


def correlations(
    estimates: Iterable[Mapping[str, Any]], size: str, key: Key, truth: Truth, view: str
) -> list[float]:
    """Spearman of neurons, one per estimate."""
    criterion, reduction = key
    return [_number(judge("mlp_neuron", e[size][criterion][reduction], truth, view)[0]) for e in estimates]


def _samples_table(study: Study, estimates: Estimates, truth: Truth) -> list[str]:
    sizes = [str(size) for size in study.settings.sizes]
    rows = [["source", "Spearman with", *(f"{size} samples" for size in sizes)]]
    for source in study.settings.sources:
        mine = [found for (name, _), found in estimates.items() if name == source]
        for view, words in VIEWS.items():
            row = [source, words]
            for size in sizes:
                rhos = correlations(mine, size, DEFAULT, truth, view)
                row.append(f"{statistics.fmean(rhos):.2f} ({min(rhos):.2f}–{max(rhos):.2f})")
            rows.append(row)
    title = f"## How much text, and which: {DEFAULT[0]} with {DEFAULT[1]}, neurons"
    return [title, "", "Means over the seeds, and their range.", "", *table(rows)]


def _svg(figure: Any) -> str:
    """The figure as SVG text, the same for the same numbers."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pruner_lib", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
