"""The lab in which criteria are compared with each other, and with what ablation measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets as widgets

from pruner_lib.display.drawing import image_tag
from pruner_lib.display.importance import describe_ranks, lowest_overlap, plot_ranks
from pruner_lib.display.widgets.panel import Panel, choice, share, table
from pruner_lib.importance import ImportanceScores
from pruner_lib.importance.grading import grade

Key = tuple[str, str, str]  # criterion, reduction, calibration
NONE = "none"  # the reduction and the calibration of scores that have none


class Side(widgets.VBox):
    """Three drop-down lists that choose one set of scores; ``value`` is the chosen key."""

    def __init__(self, label: str, keys: Sequence[Key], value: Key) -> None:
        self._keys, self._busy, self._told = list(keys), False, lambda: None
        self.criterion = choice("Criterion", list(dict.fromkeys(key[0] for key in keys)), value[0])
        self.reduction = choice("Reduction", [value[1]], value[1])
        self.calibration = choice("Calibration", [value[2]], value[2])
        super().__init__([widgets.HTML(f"<b>{label}</b>"), self.criterion, self.reduction, self.calibration])
        self._narrow()
        for control in (self.criterion, self.reduction, self.calibration):
            control.observe(lambda change: self._changed(), names="value")

    def follow(self, told: Callable[[], None]) -> None:
        """Call this at every change."""
        self._told = told

    @property
    def value(self) -> Key:
        """Criterion, reduction and calibration."""
        return self.criterion.value, self.reduction.value, self.calibration.value

    @value.setter
    def value(self, key: Key) -> None:
        self.criterion.value = key[0]
        self.reduction.value = key[1]
        self.calibration.value = key[2]

    def _changed(self) -> None:
        if not self._busy:
            self._narrow()
            self._told()

    def _narrow(self) -> None:
        """Offer only what there is: reductions of this criterion, calibrations of the two."""
        self._busy = True
        for place, control in ((1, self.reduction), (2, self.calibration)):
            before = self.value[:place]
            found = list(dict.fromkeys(key[place] for key in self._keys if key[:place] == before))
            kept = control.value if control.value in found else found[0]
            if list(control.options) != found:
                control.options = found
            control.value = kept
        self._busy = False


class CriteriaExplorer(Panel):
    """See :func:`criteria_explorer`."""

    def __init__(
        self,
        scores: Mapping[str, ImportanceScores],
        truth: ImportanceScores | None,
        groups: Mapping[str, Sequence[int]] | None,
        estimate: Callable[[str, str, str], ImportanceScores] | None,
        choices: Sequence[Key],
    ) -> None:
        self._scores = _by_key(scores)
        self._truth, self._groups, self._estimate = truth, groups, estimate
        keys = list(dict.fromkeys([*self._scores, *choices]))
        given = list(self._scores.values())
        common = [name for name in given[0] if all(name in each for each in given)]
        if not common:
            raise ValueError(
                "these scores have no family in common; estimate all of them for the same families"
            )
        first, second = next(iter(self._scores)), list(self._scores)[-1]
        super().__init__(
            {
                "first": Side("Across", keys, first),
                "second": Side("Upwards", keys, second),
                "family": choice("Family", common, _graded(common, truth)),
                "ratio": share("Share removed", 0.25, 0.05, 0.95),
            },
            name="criteria",
        )
        sides = widgets.HBox([self.first, self.second], layout={"flex_flow": "row wrap"})
        self.children = (sides, self.family, self.ratio, self.text, self.picture)
        self.first.follow(self.update)
        self.second.follow(self.update)
        self.follow(self.family, self.ratio)

    def scores(self, key: Key) -> ImportanceScores:
        """The scores of one side, estimated now where nobody did before."""
        if key not in self._scores:
            if self._estimate is None:
                raise ValueError(f"{_said(key)} was not scored, and no estimate=… was given to score it")
            self.say(f"Scoring {escape(_said(key))} …")
            self._scores[key] = self._estimate(*key)
        return self._scores[key]

    def show(self) -> None:
        keys = self.first.value, self.second.value
        pair = self.scores(keys[0]), self.scores(keys[1])
        family, ratio = self.family.value, self.ratio.value
        names = _said(keys[0]), _said(keys[1])
        line = describe_ranks(*pair, family, ratio=ratio, names=names)
        rows = [
            [f"<b>{escape(name)}</b>", _lowest(scores, family), *self._graded(scores, family)]
            for name, scores in zip(names, pair, strict=True)
        ]
        header = ["", "lowest groups, first to go first"]
        if self._truth is not None:
            header += ["rank correlation with ablation", f"share of the truly lowest {100 * ratio:.0f} %"]
        self.say(
            f"{escape(line)} By chance it would be {100 * ratio:.0f} %."
            f"{table(header, rows, numbers=len(header) - 2)}"
        )
        self.picture.value = image_tag(plot_ranks(*pair, family, ratio=ratio, names=names), line)

    @property
    def overlap(self) -> float:
        """Share of the lowest groups that both sides name."""
        pair = self.scores(self.first.value), self.scores(self.second.value)
        return lowest_overlap(*pair, self.family.value, self.ratio.value)

    def _graded(self, scores: ImportanceScores, family: str) -> list[str]:
        if self._truth is None:
            return []
        if family not in self._truth:
            return ["not ablated", "not ablated"]
        found = grade(scores, self._truth, ratio=self.ratio.value, groups=self._groups)
        return [f"{found.rank_correlation[family]:+.2f}", f"{found.overlap[family]:.0%}"]


def _by_key(scores: Mapping[str, ImportanceScores]) -> dict[Key, ImportanceScores]:
    """Scores under criterion, reduction and calibration as noted; by name where notes are alike."""
    if not scores:
        raise ValueError("no scores given; give at least one, as {name: scores}")
    keys = {name: _key(name, values) for name, values in scores.items()}
    counts = list(keys.values())
    return {(name, *key[1:]) if counts.count(key) > 1 else key: scores[name] for name, key in keys.items()}


def _said(key: Key) -> str:
    return " × ".join(part for part in key if part != NONE)


def _key(name: str, scores: ImportanceScores) -> Key:
    text = f"{scores.source or 'text'}, {scores.num_samples} × {scores.seq_len}"
    return scores.criterion or name, scores.reduction or NONE, text if scores.num_samples else NONE


def _graded(families: Sequence[str], truth: ImportanceScores | None) -> str:
    """The family to begin with: one that was ablated, else the last."""
    ablated = [name for name in families if truth is not None and name in truth]
    return (ablated or list(families))[-1]


def _lowest(scores: ImportanceScores, family: str, most: int = 6) -> str:
    order = scores[family].argsort(stable=True)[:most].tolist()
    return ", ".join(map(str, order)) + (" …" if len(scores[family]) > most else "")


def criteria_explorer(
    scores: Mapping[str, ImportanceScores],
    *,
    truth: ImportanceScores | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    estimate: Callable[[str, str, str], ImportanceScores] | None = None,
    choices: Sequence[Key] = (),
) -> CriteriaExplorer:
    """Choose criterion, reduction and calibration twice: ranks, overlap, and grades against ablation.

    What a set of scores is comes from its own notes (``criterion``, ``reduction``, ``source`` and samples);
    sets whose notes are alike go by their names. Further combinations are scored when they are chosen:

    >>> texts = {"books": batches, "c4": other}
    >>> def estimate(criterion, reduction, text):
    ...     return estimate_importance(model, dependencies, texts[text], criterion=criterion,
    ...                                reduction=reduction, families=[family])
    >>> choices = list(itertools.product(("taylor_first", "wanda"), ("sum", "max"), texts))
    >>> criteria_explorer({"l2": l2}, truth=truth, estimate=estimate, choices=choices)

    Controls: ``first`` and ``second`` (each with ``criterion``, ``reduction``, ``calibration``), ``family``,
    ``ratio``.

    Args:
        scores: name to scores of the same families.
        truth: from ``measure_importance``; each side is graded against it where it has the family.
        groups: family name to the groups that ``truth`` holds, where not all were measured.
        estimate: called with criterion, reduction and calibration; must score the families offered.
        choices: the combinations that ``estimate`` can score, besides those given.

    Raises:
        ValueError: no scores, or scores without a family in common.
    """
    return CriteriaExplorer(scores, truth, groups, estimate, choices)
