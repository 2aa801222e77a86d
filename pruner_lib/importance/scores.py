"""The noun of this stage: one score per group of each family, with how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruner_lib.assets.files import write_whole
from pruner_lib.discovery.families import UnknownFamilyError

FORMAT = "pruner_lib.importance_scores"
VERSION = 1
_NOTES = ("criterion", "reduction", "source", "seed", "num_samples", "seq_len")


@dataclass(frozen=True, eq=False, repr=False)
class ImportanceScores:
    """One score per group of each family; the higher, the more the group matters.

    Example:
        >>> scores = ImportanceScores.from_dict({"layers.0.mlp_neuron": torch.tensor([0.3, 0.1])})
        >>> scores["layers.0.mlp_neuron"].argmin()
        tensor(1)

    Attributes:
        scores: family name to a tensor ``[size]``.
        criterion: how one weight, vector or group got its score; None if not recorded.
        reduction: how the scores of a group's slices became one; None if not recorded.
        source: the calibration text, in words; None if none was used or it is unknown.
        seed: of the random draws, None if there were none.
        num_samples: calibration sequences, 0 if none were used.
        seq_len: tokens of each sequence, 0 if none were used.

    Raises:
        ValueError: a tensor that is not one-dimensional, or scores that are not finite.
    """

    scores: Mapping[str, Tensor]
    criterion: str | None = None
    reduction: str | None = None
    source: str | None = None
    seed: int | None = None
    num_samples: int = 0
    seq_len: int = 0

    def __post_init__(self) -> None:
        checked = {name: _checked(name, values) for name, values in self.scores.items()}
        object.__setattr__(self, "scores", MappingProxyType(checked))

    @classmethod
    def from_dict(cls, scores: Mapping[str, Any], **notes: Any) -> ImportanceScores:
        """Scores made elsewhere.

        Args:
            scores: family name to a tensor, array or list ``[size]``.
            **notes: any of criterion, reduction, source, seed, num_samples, seq_len.
        """
        return cls(scores=scores, **notes)

    def __getitem__(self, family: str) -> Tensor:
        if family not in self.scores:
            listed = ", ".join(list(self.scores)[:3]) or "none"
            raise UnknownFamilyError(
                f"no scores for family {family!r}; there are {len(self.scores)} families: {listed} …. "
                "Name it in families=… when estimating"
            )
        return self.scores[family]

    def __contains__(self, family: object) -> bool:
        return family in self.scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        notes = [f"{note}={value!r}" for note in _NOTES if (value := getattr(self, note)) is not None]
        lines = [f"ImportanceScores({len(self)} families, {', '.join(notes)})"]
        shown = list(self.scores.items())
        for name, values in shown[:8]:
            lines.append(
                f"  {name:<32}{len(values):>6} groups  min {values.min():.3e}  "
                f"median {values.median():.3e}  max {values.max():.3e}"
            )
        if len(shown) > 8:
            lines.append(f"  … and {len(shown) - 8} more")
        return "\n".join(lines)

    def rank_correlation(self, other: ImportanceScores) -> RankCorrelation:
        """Spearman's rank correlation with other scores, for every family both hold.

        ρ is Pearson's correlation of the ranks, ties given their mean rank: 1 is the same order,
        -1 the reverse. It is undefined (NaN) where one side is constant.

        Args:
            other: scores of the same families of the same model.

        Returns:
            ρ per family, and their mean.

        Raises:
            ValueError: no family in common, or one with different sizes.
        """
        common = [name for name in self.scores if name in other.scores]
        if not common:
            raise ValueError("the two scores have no family in common; estimate both for the same families")
        per_family = {}
        for name in common:
            if len(self[name]) != len(other[name]):
                raise ValueError(
                    f"{name} has {len(self[name])} groups here and {len(other[name])} there: "
                    "these are scores of different models"
                )
            per_family[name] = spearman(self[name], other[name])
        return RankCorrelation(MappingProxyType(per_family))

    def plot(self, view: str = "heat map", **options: Any) -> Any:
        """The scores drawn; end a cell with it.

        Args:
            view: ``"heat map"``, layers × groups of a kind; ``"sorted"``, the falling curve of a family;
                ``"histogram"``, how the scores of a kind are spread.
            **options: ``kind`` or ``family``; the last one scored if left out.

        Raises:
            ValueError: another view, or no scores.
        """
        from pruner_lib import display

        if not self.scores:
            raise ValueError("there are no scores to draw; estimate at least one family")

        if view == "sorted":
            family = options.pop("family", list(self)[-1])
            return display.plot_sorted_scores({self.criterion or "scores": self}, family, **options)
        views = {"heat map": display.plot_importance, "histogram": display.plot_score_histogram}
        if view not in views:
            raise ValueError(f"unknown view {view!r}; valid are heat map, sorted, histogram")
        return views[view](self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file, replaced whole or not at all. Numbers keep every bit.

        Args:
            path: the file to write; its folder must exist.

        Returns:
            The path written.
        """
        document = {"format": FORMAT, "version": VERSION, **{note: getattr(self, note) for note in _NOTES}}
        document["scores"] = {
            name: {"dtype": str(values.dtype).removeprefix("torch."), "values": values.tolist()}
            for name, values in self.scores.items()
        }
        return write_whole(Path(path), json.dumps(document))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceScores:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not a file of scores, or an incomplete one.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            known = document["format"] == FORMAT and document["version"] == VERSION
            scores = {
                name: torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
                for name, entry in document["scores"].items()
            }
            notes = {note: document[note] for note in _NOTES}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no importance scores, or not all of them: {error!r}") from error
        if not known:
            raise ValueError(f"{path} holds no importance scores of format {FORMAT!r}, version {VERSION}")
        return cls(scores=scores, **notes)


def _checked(name: str, values: Any) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    if not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.float64)
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(f"{name}: one score per group makes a shape [size]; got {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).nonzero()[0])
        raise ValueError(
            f"{name}: the score of group {bad} is {tensor[bad].item()}; scores must be finite. "
            "Estimate in float32, or look for NaN weights"
        )
    return tensor.clone()


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ per family, and their mean.

    Attributes:
        per_family: family name to ρ; NaN where one side is constant.
    """

    per_family: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over the families where ρ is defined; NaN if there is none."""
        defined = [rho for rho in self.per_family.values() if rho == rho]
        return sum(defined) / len(defined) if defined else float("nan")

    def __float__(self) -> float:
        return self.mean

    def __getitem__(self, family: str) -> float:
        return self.per_family[family]

    def __repr__(self) -> str:
        return f"RankCorrelation(mean {self.mean:.3f} over {len(self.per_family)} families)"


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's ρ of two vectors ``[n]``: Pearson's correlation of their ranks, ties averaged."""
    ranks = [_ranks(np.asarray(values.detach().cpu().double())) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of the ranks they span."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]
