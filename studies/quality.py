"""What pruning leaves of the quality, without any training: ``python studies/quality.py``

SmolLM2 at 10, 20, 30 and 50 % fewer parameters: criteria × scope × compensation, width, depth and both mixed,
three calibration seeds, calibration and test text of one kind and of two. Perplexity of windows of 128 and
of 1024 tokens.

Results are kept in one file that is committed, and no case is run twice: stop it and start it again as
you like. The page is written after every case.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from records import Records, study_parser

import pruner_lib as pl
from pruner_lib.assets.devices import computes_in_bfloat16
from pruner_lib.assets.files import write_whole
from pruner_lib.pruning import Compensated, Compensation

TESTS = ("wikitext2", "c4", "books")
MIXED = "all three"
LENGTHS = (128, 1024)
SHARES = {"10 %": 0.9, "20 %": 0.8, "30 %": 0.7, "50 %": 0.5}
HEADS_AND_NEURONS = ("attention_head", "mlp_neuron")
LATE = "half of layers 4–26"  # the paper's way: half of the groups of all but the outer layers


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        cut: share of the parameters removed, ``LATE``, or ``"dense"``.
        criterion: how groups are scored; layers are scored by the loss without them.
        scope: ``"local"``, ``"global"`` (standardised), ``"nats"`` (scaled to the loss), ``"fitted nats"``
            (scaled to the divergence that compensation leaves, at several shares).
        what: ``"neurons"``, ``"heads, neurons"``, ``"blocks"`` or ``"blocks, neurons"``.
        compensation: None, ``"bias"`` or ``"ridge"``.
        calibration: kind of text for scores and compensation, or ``MIXED``.
        seed: of its draws.
        steps: in how many it is cut; the model is compensated and scored again between them.
        windows: of text that the fit reads; 0 takes the study's.
        costs: windows on which readers are fitted while costs are measured, on a sixteenth as many.
    """

    cut: str
    criterion: str = "wanda"
    scope: str = "fitted nats"
    what: str = "heads, neurons"
    compensation: str | None = None
    calibration: str = "wikitext2"
    seed: int = 0
    steps: int = 1
    windows: int = 0
    costs: int = 128

    @property
    def name(self) -> str:
        if self.cut == "dense":
            return "dense"
        parts = (
            self.cut,
            self.criterion,
            self.scope,
            self.what,
            self.compensation or "plain",
            self.calibration,
        )
        more = [f"{self.steps} steps"] if self.steps > 1 else []
        more += [f"{self.windows} windows"] if self.windows else []
        more += [f"costs on {self.costs}"] if self.costs != 128 else []
        return " · ".join((*parts, f"seed {self.seed}", *more))

    @property
    def on_all_texts(self) -> bool:
        """Whether it is tested on more than one kind of text: the recipe at 20 %, and what it begins from."""
        if self.windows > 1024:  # tests of three kinds take longer than the rest of a case
            return False
        free = ("calibration", "compensation", "scope", "steps", "windows")
        ours = dataclasses.replace(BEST, **{name: getattr(self, name) for name in free})
        return self.cut == "dense" or (self == ours and "nats" in self.scope)


BEST = Case("20 %", compensation="ridge")
AFTER_A_FIT: dict[str, Any] = {"ratio": (1 / 3, 2 / 3), "measure": "divergence"}


def cases() -> list[Case]:
    """In the order in which they tell most."""
    vary = dataclasses.replace
    nats = vary(BEST, scope="nats")
    both = (None, "ridge")
    found = [Case("dense", scope="nats"), BEST]
    found += [vary(BEST, windows=windows) for windows in (1024, 2048)]
    found += [vary(BEST, calibration=MIXED, windows=windows) for windows in (0, 1024)]
    found += [vary(nats, compensation=c) for c in both]
    found += [Case(LATE, "taylor_first", "local", compensation=c) for c in both]
    found += [Case(LATE, "wanda", "local", compensation="ridge")]
    found += [vary(BEST, cut=cut) for cut in ("10 %", "30 %", "50 %")]
    found += [vary(BEST, compensation=c) for c in (None, "bias")]
    found += [vary(BEST, seed=seed) for seed in (1, 2)]
    found += [vary(BEST, seed=seed, windows=2048) for seed in (1, 2)]
    found += [vary(BEST, seed=1, costs=512)]
    found += [vary(BEST, scope="local", compensation=c) for c in both]
    found += [vary(BEST, calibration=text) for text in ("c4", "books")]
    found += [vary(nats, what=what, compensation=c) for what in ("blocks", "blocks, neurons") for c in both]
    found += [vary(nats, steps=steps) for steps in (2, 4)]
    found += [vary(nats, cut=cut, compensation=c) for cut in ("10 %", "30 %", "50 %") for c in both]
    found += [vary(nats, calibration=text) for text in ("c4", "books", MIXED)]
    for criterion in ("taylor_first", "taylor_second", "wanda", "fluctuation", "l2", "random"):
        for scope in ("local", "global"):
            found += [vary(BEST, criterion=criterion, scope=scope, compensation=c) for c in both]
    found += [vary(BEST, criterion="fluctuation", scope="local", compensation="bias")]
    found += [vary(BEST, scope="local", what="neurons")]
    found += [vary(BEST, criterion=criterion) for criterion in ("taylor_first", "random")]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Study:
    """What to run it with; see the command's options."""

    records: Path
    page: Path
    model: str = pl.DEFAULT_MODEL
    device: str | None = None
    windows: int = 256
    test_tokens: int = 65536

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {name: getattr(self, name) for name in ("model", "windows", "test_tokens")}


class Bench:
    """The dense model, texts and scores, made once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._scores: dict[tuple[Any, ...], pl.ImportanceScores] = {}

    @cached_property
    def dense(self) -> tuple[Any, Any]:
        return pl.load_model(self.study.model, device=self.study.device)

    @cached_property
    def dependencies(self) -> pl.DependencyMap:
        return pl.discover(self.dense[0])

    def batches(self, case: Case, windows: int, shift: int = 0) -> torch.Tensor:
        """Calibration windows; of mixed text, as many of each kind, in turn."""
        kinds = TESTS if case.calibration == MIXED else (case.calibration,)
        count, seed = -(-windows // len(kinds)), 10 * case.seed + shift
        found = [
            pl.load_calibration(self.dense[1], source=kind, num_samples=count, seq_len=128, seed=seed)
            for kind in kinds
        ]
        return torch.stack(found, 1).flatten(0, 1)[:windows]

    def scores(self, case: Case) -> dict[str, torch.Tensor]:
        """Of the dense model; made once for all cases that differ in what is done with them."""
        scope = case.scope if "nats" in case.scope else ""
        key = (case.criterion, scope, case.calibration, case.seed, case.costs)
        if key not in self._scores:
            self._scores[key] = self.score(*self._dense_and_map, case)
        scores = dict(self._scores[key].scores)
        if "blocks" in case.what:
            held = self.batches(case, 16, shift=1)
            scores |= pl.score_layers(*self._dense_and_map, held, measure="loss").scores
        return scores

    def score(self, model: Any, dependencies: pl.DependencyMap, case: Case) -> pl.ImportanceScores:
        """Of every head and neuron."""
        families = dependencies.select(kind=HEADS_AND_NEURONS)
        found = pl.estimate_importance(
            model, dependencies, self.batches(case, 64), criterion=case.criterion, families=families,
            micro_batch_size=16,
        )  # fmt: skip
        if case.scope == "nats":
            found = pl.scale_to_loss(model, dependencies, found, self.batches(case, 16, shift=1))
        elif case.scope == "fitted nats":
            measured = self.batches(case, case.costs // 16, shift=1)
            fitted = self.batches(case, case.costs, shift=2)
            found = pl.scale_to_loss(model, dependencies, found, measured, compensate=fitted, **AFTER_A_FIT)
        return found

    @property
    def _dense_and_map(self) -> tuple[Any, pl.DependencyMap]:
        return self.dense[0], self.dependencies

    def planning(self, case: Case) -> dict[str, Any]:
        """Options of ``plan_pruning`` and ``prune_iteratively``."""
        kinds = {
            "neurons": ("mlp_neuron",),
            "heads, neurons": HEADS_AND_NEURONS,
            "blocks": ("block",),
            "blocks, neurons": ("block", "mlp_neuron"),
        }[case.what]
        if case.cut == LATE:
            return {"ratio": 0.5, "layers": range(4, self.dependencies.num_layers - 3), "kinds": kinds}
        how = {"preset": "best"} if "nats" in case.scope else {"scope": case.scope}
        return {"target_params": SHARES[case.cut], "kinds": kinds, **how}

    def pruned(self, case: Case, record: dict[str, Any]) -> Any:
        """Cut and compensate; notes what it took and what the fit did."""
        model, fit = self.dense[0], self._fit(case)
        begun = time.perf_counter()
        if case.steps > 1:

            def score(current: Any, dependencies: pl.DependencyMap) -> Any:
                return self.scores(case) if current is model else self.score(current, dependencies, case)

            options = {"steps": case.steps, "compensate": fit, **self.planning(case)}
            *_, last = pl.prune_iteratively(model, score, **options)
            record["seconds"] = time.perf_counter() - begun
            return last.model
        plan = pl.plan_pruning(self.dependencies, self.scores(case), **self.planning(case))
        record["plan_seconds"] = time.perf_counter() - begun
        pruned = pl.prune(model, plan)
        if fit is not None:
            done = pl.compensate(model, pruned, plan, fit)
            record["fit"], pruned = _summary(done), done.model
        record["seconds"] = time.perf_counter() - begun
        return pruned

    def _fit(self, case: Case) -> Compensation | None:
        if case.compensation is None:
            return None
        windows = self.batches(case, case.windows or self.study.windows, shift=2)
        return Compensation(windows, method=case.compensation)


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Cut, compensate, measure."""
    model, tokenizer = bench.dense
    record: dict[str, Any] = {**asdict(case), "dense_params": sum(p.numel() for p in model.parameters())}
    if case.cut != "dense":
        model = bench.pruned(case, record)
    record["params"] = sum(p.numel() for p in model.parameters())
    quick = next(model.parameters()).device.type == "cpu" and computes_in_bfloat16(torch.device("cpu"))
    tested = copy.deepcopy(model).to(torch.bfloat16) if quick else model
    record["tested_in"] = str(next(tested.parameters()).dtype).removeprefix("torch.")
    record["perplexity"] = {}
    for text in TESTS if case.on_all_texts else TESTS[:1]:
        words = pl.load_text(text, "test")
        for length in LENGTHS:
            # As many tokens a pass at either length: the loss over a large vocabulary wants no more.
            options = {"seq_len": length, "max_tokens": bench.study.test_tokens, "batch_size": 1024 // length}
            found = pl.perplexity(tested, tokenizer, words, source=text, **options)
            record["perplexity"][f"{text}, {length}"] = round(float(found), 3)
    return record


def _summary(done: Compensated) -> dict[str, Any]:
    return {
        "kept": done.kept, "loss_before": done.loss_before, "loss_after": done.loss_after,
        "ridge": [reader.ridge for reader in done.readers],
    }  # fmt: skip


def _ranking(record: Mapping[str, Any]) -> str:
    """How groups are compared, in words; with steps and text for costs where these are not the usual."""
    steps, costs = record.get("steps", 1), record.get("costs", 128)
    return (
        record["scope"]
        + (f", {steps} steps" if steps > 1 else "")
        + (f", costs on {costs}" if costs != 128 else "")
    )


def _fitted(record: Mapping[str, Any]) -> str:
    """How readers were fitted, and on how much where that is not the study's."""
    windows = record.get("windows", 0)
    return (record["compensation"] or "none") + (f", {windows:,} windows" if windows else "")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Rows with ratios to the dense model."""
    dense = next((r for r in records if r["cut"] == "dense"), None)
    columns = list(dense["perplexity"]) if dense else []
    head = [
        "removed",
        "criterion",
        "scope",
        "what",
        "compensation",
        "calibration",
        "seed",
        "parameters",
        *columns,
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 7 + "---:|" * (1 + len(columns))]
    for record in records:
        told = ["–"] * 6 if record["cut"] == "dense" else [
            record["criterion"], _ranking(record), record["what"], _fitted(record),
            record["calibration"], str(record["seed"]),
        ]  # fmt: skip
        share = record["params"] / record["dense_params"]
        cells = [record["cut"], *told, f"{share:.4f}"]
        for column in columns:
            value = record["perplexity"].get(column)
            ratio = f" ({value / dense['perplexity'][column]:.2f} ×)" if value and dense else ""
            cells.append(f"{value:.1f}{ratio}" if value else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(study: Study, records: Sequence[Mapping[str, Any]]) -> None:
    """The page of the documentation, from what has been run so far."""
    page = [
        "# Quality without training",
        f"Written by `python studies/quality.py`: {len(records)} of {len(cases())} cases, model "
        f"{study.model}, {study.windows} windows of 128 tokens for compensation and 64 for scores, at most "
        f"{study.test_tokens:,} test tokens. In brackets: times the dense model. Perplexities of two "
        "calibration texts differ by adaptation, too: read each row across its test texts. Cut and fitted in "
        "float32; tested in bfloat16 where the CPU computes in it, which moved the dense figures on "
        "WikiText-2 by less than 0.03 %.",
        table(records),
    ]
    study.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(study.page, "\n\n".join(page) + "\n")


def run(study: Study, only: str = "") -> list[dict[str, Any]]:
    """Every case that has not been run, in order; the page after each."""
    records, bench = Records(study.records, study.settings()), Bench(study)
    return records.complete(
        cases(), lambda case: run_case(bench, case), lambda found: write_page(study, found), only
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = study_parser(str(__doc__), "docs/quality", Study, model=str, windows=int, test_tokens=int)
    given = vars(parser.parse_args(arguments))
    only = given.pop("only")
    print(table(run(Study(**given), only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
