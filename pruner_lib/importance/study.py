"""How right is each criterion? Every criterion × reduction against the measured loss change.

A group's loss change is measured by zeroing it alone; and, since pruning takes many groups at once, the
lowest quarter of every judged family, as each criterion × reduction has it, is zeroed together too.

    python -m pruner_lib.importance.study --out docs/importance            # under an hour on two cores
    python -m pruner_lib.importance.study --smoke --out runs/smoke         # a minute, to see that it runs

Every measured piece is kept as a JSON file in ``--work``; a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruner_lib.assets.files import write_whole
from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.importance.ablation import loss_changes
from pruner_lib.importance.calibration import check_finite, mean_loss, token_losses, untouched
from pruner_lib.importance.criteria import CRITERIA, REDUCTIONS
from pruner_lib.importance.estimate import estimate_importance, scored_dims, slice_scores
from pruner_lib.importance.gradients import handing_over
from pruner_lib.importance.inputs import InputWatch
from pruner_lib.importance.parallel import Share
from pruner_lib.importance.scoring import ByDim, index_scores

Draw = Callable[..., Tensor]  # (source, split, num_samples, seq_len, seed) to token ids


@dataclass(frozen=True)
class StudySettings:
    """What is measured.

    Attributes:
        layers: whose neurons and query heads are judged; heads are judged in all layers.
        neurons: sampled per layer, the same for every estimate (NumPy's PCG64, seed 0, without repeats).
        truth_source, truth_split, truth_samples, truth_seq_len: text on which groups are zeroed; half of
            the samples against the other half says how reliable the truth is.
        sources, seeds: calibration texts (their training split) and draws.
        sizes: numbers of calibration samples, rising.
        seq_len: tokens of a calibration sample.
        ratio: of each judged family, the share of groups that is zeroed at once, lowest scores first.

    Raises:
        ValueError: nothing to measure, sizes that do not rise, or a ratio outside (0, 1).
    """

    layers: tuple[int, ...]
    neurons: int = 128
    truth_source: str = "wikitext2"
    truth_split: str = "validation"
    truth_samples: int = 8
    truth_seq_len: int = 128
    sources: tuple[str, ...] = ("books", "wikitext2", "c4")
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    seq_len: int = 64
    ratio: float = 0.25

    def __post_init__(self) -> None:
        if not (self.layers and self.sources and self.seeds and self.sizes):
            raise ValueError(f"layers, sources, seeds and sizes must each name something; got {self}")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes must rise from at least 1; got {self.sizes}")
        if self.truth_samples < 2 or self.truth_samples % 2:
            raise ValueError(f"truth_samples must be even, to be split in halves; got {self.truth_samples}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, such as 0.25; got {self.ratio}")

    @classmethod
    def full(cls, num_layers: int) -> StudySettings:
        """Six layers spread over the model, neither the first nor the last."""
        layers = np.linspace(1, max(1, num_layers - 2), 6).round().astype(int)
        return cls(layers=tuple(dict.fromkeys(layers.tolist())))

    @classmethod
    def smoke(cls, num_layers: int) -> StudySettings:
        """As small as it can be."""
        return cls(
            layers=(num_layers - 1,),
            neurons=6,
            truth_samples=2,
            truth_seq_len=16,
            sources=("books",),
            seeds=(0,),
            sizes=(1, 2),
            seq_len=16,
        )


@dataclass(frozen=True)
class Study:
    """One model, its settings, and the folder of measured pieces.

    Attributes:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        draw: gives calibration batches; ``load_calibration`` with the model's tokenizer.
        settings: what is measured.
        work: folder of the pieces.
        name: of the model, part of what a piece is of.
    """

    model: nn.Module
    dependencies: DependencyMap
    draw: Draw
    settings: StudySettings
    work: Path
    name: str = "model"

    def families(self) -> dict[str, tuple[GroupFamily, list[int]]]:
        """Families that are judged, each with the groups that are measured."""
        found = {family.name: family for family in self.dependencies.select("attention_head")}
        layers = self.settings.layers
        found |= {family.name: family for family in self.dependencies.select("query_head", layers)}
        chosen = {name: (family, list(range(family.size))) for name, family in found.items()}
        for family in self.dependencies.select("mlp_neuron", layers):
            generator = np.random.Generator(np.random.PCG64([0, family.layer or 0]))
            sample = generator.permutation(family.size)[: self.settings.neurons]
            chosen[family.name] = (family, sorted(sample.tolist()))
        return chosen

    def truth_tokens(self) -> Tensor:
        """The text on which groups are zeroed ``[truth_samples, truth_seq_len]``."""
        wanted = self.settings
        return self.draw(
            source=wanted.truth_source,
            split=wanted.truth_split,
            num_samples=wanted.truth_samples,
            seq_len=wanted.truth_seq_len,
            seed=0,
        )

    def piece(self, name: str, make: Callable[[], Any]) -> Any:
        """A measured piece: from its file if that is of the same study, else made and written."""
        described = {"model": self.name, **asdict(self.settings)}
        fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        path = self.work / f"{name}.json"
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["of"] == fingerprint:
                return document["value"]
        start = time.perf_counter()
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        took = round(time.perf_counter() - start, 1)
        write_whole(path, json.dumps({"of": fingerprint, "seconds": took, "value": value}))
        print(f"{name}: {took} s", flush=True)
        return value


def measure_truth(study: Study) -> dict[str, list[list[float]]]:
    """Family to the loss changes of its measured groups on each half of the text ``[2][groups]``."""
    tokens, truth = study.truth_tokens(), {}
    for name, (family, groups) in study.families().items():

        def make(family: GroupFamily = family, groups: list[int] = groups) -> list[list[float]]:
            return [
                loss_changes(study.model, study.dependencies, half, family, groups, progress=True).tolist()
                for half in tokens.chunk(2)
            ]

        truth[name] = study.piece(f"truth/{name}", make)
    return truth


def measure_estimates(study: Study) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(source, seed, what was estimated), one after the other.

    ``"scores"`` is number of samples → criterion → reduction → family → scores of the measured groups;
    ``"lowest"``, at the largest number, criterion → reduction → family → the groups of the lowest share.
    """
    for source in study.settings.sources:
        for seed in study.settings.seeds:
            name = f"estimates/{source}-{seed}"
            yield source, seed, study.piece(name, partial(_estimate, study, source, seed))


def _estimate(study: Study, source: str, seed: int) -> dict[str, Any]:
    """Every criterion × reduction at every size, from one pass over the largest draw.

    A smaller draw of the same seed is the beginning of a larger one, so sums over the first sequences
    are what the smaller draw would have given.
    """
    settings, chosen = study.settings, study.families()
    tokens = study.draw(
        source=source, split="train", num_samples=settings.sizes[-1], seq_len=settings.seq_len, seed=seed
    )
    families = [family for family, _ in chosen.values()]
    dims = scored_dims(study.model, study.dependencies, families, include_vectors=True)
    parameters = {name: study.model.get_parameter(name) for name in dims}
    watch = InputWatch({n: p for n, p in parameters.items() if p.ndim > 1}, ("r", "m", "v"))
    sums: dict[str, list[Tensor]] = {
        name: [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for _ in range(2)]
        for name, p in parameters.items()
    }

    def add(name: str, gradient: Tensor) -> None:
        wide = gradient.float()
        sums[name][0].add_(wide)
        sums[name][1].addcmul_(wide, wide)

    found: dict[str, Any] = {"scores": {}}
    with untouched(study.model, parameters) as wanted, handing_over(wanted, add), torch.enable_grad():
        for number, sequence in enumerate(tokens.split(1)):
            with watch:
                losses = token_losses(study.model, sequence)
            check_finite(study.model, sequence, losses.detach(), number)
            losses.mean().backward()
            if number + 1 in settings.sizes:
                scores = _all_scores(study, watch, sums, dims, number + 1, seed)
                found["scores"][str(number + 1)] = _each(
                    scores, lambda name, values: values[chosen[name][1]].tolist()
                )
    found["lowest"] = _each(scores, lambda name, values: _lowest(values, settings.ratio))
    return found


AllScores = dict[str, dict[str, dict[str, Any]]]  # criterion → reduction → family → something


def _each(scores: AllScores, change: Callable[[str, Tensor], Any]) -> AllScores:
    """The same with every family's scores made into something else."""
    return {
        criterion: {
            reduction: {name: change(name, values) for name, values in families.items()}
            for reduction, families in reductions.items()
        }
        for criterion, reductions in scores.items()
    }


def _lowest(values: Tensor, ratio: float) -> list[int]:
    """Indices of the lowest round(ratio · n) scores, at least one; ties go to the lower index."""
    return sorted(values.argsort(stable=True)[: max(1, round(ratio * len(values)))].tolist())


def _all_scores(
    study: Study,
    watch: InputWatch,
    sums: Mapping[str, Sequence[Tensor]],
    dims: Mapping[str, set[int]],
    count: int,
    seed: int,
) -> AllScores:
    """Criterion → reduction → family → scores of all its groups, from sums over ``count`` sequences."""
    parameters = {name: study.model.get_parameter(name) for name in dims}
    uses = watch.finish(parameters, Share(), count * study.settings.seq_len)
    families = {name: family for name, (family, _) in study.families().items()}
    found: AllScores = {}
    for criterion in CRITERIA.values():
        if criterion.scope == "group":
            drawn = estimate_importance(
                study.model, study.dependencies, None, criterion=criterion, families=list(families), seed=seed
            )
            found[criterion.name] = {"none": dict(drawn.scores)}
            continue
        by_index: dict[str, ByDim] = {}
        for name, parameter in parameters.items():
            pairs = zip(("g", "h"), sums[name], strict=True)
            known = {kind: total / count for kind, total in pairs if kind in criterion.reads}
            by_index[name] = index_scores(criterion, parameter, known, uses[name], dims[name])
        mean = criterion.scope == "channel"
        slices = {name: slice_scores(family, by_index, mean=mean) for name, family in families.items()}
        found[criterion.name] = {
            reduction: {name: reduce(values) for name, values in slices.items()}
            for reduction, reduce in REDUCTIONS.items()
        }
    return found


def measure_removals(study: Study, lowest: Mapping[tuple[str, int], AllScores]) -> dict[str, AllScores]:
    """Source to criterion → reduction → kind → the loss change when the lowest share goes at once.

    Of every judged family of a kind in the studied layers, the groups that the estimate puts lowest are
    zeroed together, on half of the truth's text. Each source is judged by one draw, of another seed each.

    Args:
        study: what is measured.
        lowest: (source, seed) to what ``measure_estimates`` calls so.
    """
    sources, seeds = study.settings.sources, study.settings.seeds
    return {
        source: study.piece(f"removals/{source}", partial(_remove, study, lowest[source, seed]))
        for source, seed in zip(sources, itertools.cycle(seeds))
    }


def _remove(study: Study, lowest: AllScores) -> AllScores:
    pieces = [study.truth_tokens().chunk(2)[0]]
    layers = {name: family.layer for name, (family, _) in study.families().items()}
    measured: dict[str, float] = {}

    def loss(removal: Mapping[str, list[int]]) -> float:
        """Each set of groups once; several reductions often agree."""
        key = json.dumps(removal, sort_keys=True)
        if key not in measured:
            measured[key] = mean_loss(study.dependencies.zero(study.model, removal).eval(), pieces)
        return measured[key]

    def changes(families: Mapping[str, list[int]]) -> dict[str, float]:
        by_kind: dict[str, dict[str, list[int]]] = {}
        for name, groups in families.items():
            if layers[name] in study.settings.layers:
                by_kind.setdefault(study.dependencies.family(name).kind, {})[name] = groups
        return {kind: loss(removal) - loss({}) for kind, removal in by_kind.items()}

    return {
        criterion: {reduction: changes(families) for reduction, families in reductions.items()}
        for criterion, reductions in lowest.items()
    }


def run_study(study: Study, out: Path) -> Path:
    """Measure what is left to measure, and write ``study.md`` and its figures.

    Args:
        study: what to measure.
        out: folder for the page and figures.

    Returns:
        The page.
    """
    from pruner_lib.importance.study_report import write_report

    truth = measure_truth(study)
    found = {(source, seed): piece for source, seed, piece in measure_estimates(study)}
    removals = measure_removals(study, {key: piece["lowest"] for key, piece in found.items()})
    return write_report(study, truth, {key: piece["scores"] for key, piece in found.items()}, removals, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    from pruner_lib.assets import DEFAULT_MODEL, load_calibration, load_model

    parser = argparse.ArgumentParser(prog="python -m pruner_lib.importance.study", description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--out", type=Path, default=Path("docs/importance"), help="folder of the page")
    parser.add_argument("--work", type=Path, default=None, help="folder of the pieces")
    parser.add_argument("--smoke", action="store_true", help="the smallest study there can be")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model, device=options.device, dtype="float32")
    dependencies = discover(model)
    kind = "smoke" if options.smoke else "full"
    settings = getattr(StudySettings, kind)(dependencies.num_layers)
    work = options.work or Path("runs") / f"importance-study-{kind}"
    study = Study(
        model,
        dependencies,
        lambda **drawn: load_calibration(tokenizer, **drawn),
        settings,
        work,
        Path(options.model).name,
    )
    print(f"written: {run_study(study, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
