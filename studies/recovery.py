"""How much of a pruned model comes back in ten minutes: ``python studies/recovery.py``

At 20 % fewer parameters, with and without compensation before it: LoRA and full training, from the text
alone, from the dense model as teacher, and from both, a few minutes each; then the best of them for ten
minutes on several texts, and at half of the pruned layers' groups. Recovery on WikiText-2 train stands
beside them, so that adaptation to the test's own kind of text is seen and not mistaken for recovery.

Results are kept in one file that is committed, and no case is run twice: stop it and start it again as
you like. The page is written after every case.
"""

from __future__ import annotations

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
from pruner_lib.assets.files import write_whole
from pruner_lib.recovery import Distillation, RecoverySettings
from pruner_lib.recovery.self_generated import SelfGeneration, self_generated_data

KINDS = ("attention_head", "mlp_neuron")
# Each method: settings beside the common ones, and whether the dense model teaches.
LORA = {"rank": 32, "alpha": 64, "learning_rate": 1e-3}
FULL = {"method": "full", "learning_rate": 3e-4}
HALF = Distillation(weight=0.5)
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA": (LORA, False),
    "LoRA, teacher": (LORA, True),
    "LoRA, teacher and text": ({**LORA, "distillation": HALF}, True),
    "full": (FULL, False),
    "full, teacher": (FULL, True),
    "full, teacher and text": ({**FULL, "distillation": HALF}, True),
}
# 1024 tokens a step, in rows that hold a question with its whole answer.
COMMON = {"batch_size": 4, "micro_batch": 4, "seq_len": 256, "schedule": "cosine", "template": "chat"}
BEST = "LoRA"
MIXED = "c4, books and self-generated"
SCREENED_ON = "c4"
GOALS = {"20 %": (1.10, 0.97), "50 %": (None, 0.88)}  # perplexity / dense at most, average / dense at least
_PROBE_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        cut: ``"20 %"`` of the parameters removed, ``"50 %"`` of the groups of the pruned layers, ``"dense"``.
        compensated: whether what read the removed channels was fitted again before.
        method: one of ``METHODS``, or None for no recovery.
        text: what it learns from.
        screen: a few minutes and a short test, to compare methods, instead of all of both.
    """

    cut: str
    compensated: bool = True
    method: str | None = None
    text: str | None = None
    screen: bool = False

    @property
    def name(self) -> str:
        parts = [
            self.cut, "compensated" if self.compensated else "plain", self.method, self.text,
            "screen" if self.screen else None,
        ]  # fmt: skip
        return " · ".join(part for part in parts if part)


def cases() -> list[Case]:
    """What can be compared here, in the order in which it tells most."""
    found = [Case("dense", False), Case("dense", False, screen=True)]
    found += [Case("dense", False, BEST, SCREENED_ON, screen=True)]  # what is adaptation in the others
    for compensated in (True, False):
        found.append(Case("20 %", compensated, screen=True))
        found += [Case("20 %", compensated, method, SCREENED_ON, screen=True) for method in METHODS]
    texts = (MIXED, "wikitext2", "c4", "self-generated")
    found += [Case("20 %"), *(Case("20 %", True, BEST, text) for text in texts)]
    found += [Case("50 %"), Case("50 %", True, BEST, MIXED)]
    found += [Case("20 %", False), Case("20 %", False, BEST, MIXED)]
    methods = ("LoRA, teacher", "LoRA, teacher and text", "full")
    found += [Case("20 %", True, method, MIXED) for method in methods]
    found += [Case("20 %", True, BEST, text) for text in ("books", "instructions")]
    return found


@dataclass(frozen=True)
class Study:
    """What to run it with; see the command's options."""

    records: Path
    page: Path
    models: Path
    model: str = pl.DEFAULT_MODEL
    device: str | None = None
    minutes: float = 10.0
    screen_minutes: float = 2.0
    instructions: str = "alpaca"
    num_self_generated: int = 600
    test_tokens: int = 32768
    screen_tokens: int = 8192
    items: int = 100
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("records", "page", "models", "device")}
        return {**kept, "common": COMMON, "lora": LORA, "full": FULL}


class Bench:
    """Models and texts, made once."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def dense(self) -> tuple[Any, Any]:
        return pl.load_model(self.study.model, device=self.study.device)

    @cached_property
    def calibration(self) -> torch.Tensor:
        """Text of the kind that c4 is, never WikiText."""
        seed = self.study.seed
        return pl.load_calibration(self.dense[1], source="c4", num_samples=512, seq_len=128, seed=seed)

    def pruned(self, case: Case) -> Any:
        """The model that recovery begins with; kept in the folder of models."""
        kind = "compensated" if case.compensated else "plain"
        folder = self.study.models / f"{case.cut.split()[0]}-{kind}-seed{self.study.seed}"
        if not (folder / "config.json").is_file():
            plan = self._plan(case.cut)
            given: dict[str, Any] = {"compensate": self.calibration} if case.compensated else {}
            pl.save_pruned(pl.prune(self.dense[0], plan, **given), folder, tokenizer=self.dense[1], plan=plan)
        return pl.load_pruned(folder).to(next(self.dense[0].parameters()).device)

    def _plan(self, cut: str) -> pl.PruningPlan:
        model, text = self.dense[0], self.calibration
        dependencies = pl.discover(model)
        families = dependencies.select(kind=KINDS)
        scores = pl.estimate_importance(
            model, dependencies, text[:64], criterion="wanda", families=families, micro_batch_size=16
        )
        if cut == "20 %":
            nats = pl.scale_to_loss(model, dependencies, scores, text[-16:])
            return pl.plan_pruning(dependencies, nats, preset="best", kinds=KINDS, target_params=0.8)
        layers = range(4, dependencies.num_layers - 3)  # the paper's way: all but the outer ones
        return pl.plan_pruning(dependencies, scores, ratio=0.5, layers=layers, kinds=KINDS)

    def data(self, text: str) -> Any:
        """Training data by the name in the table.

        Raises:
            AssetError: the instructions are not there.
        """
        if text == MIXED:
            c4, books = pl.load_text("c4", "train"), pl.load_text("books", "train")
            answers = [f"{row['instruction']}\n\n{row['output']}" for row in self.data("self-generated")]
            return "\n\n".join([c4, books[: len(c4)], *answers])
        if text == "self-generated":
            settings = SelfGeneration(num_examples=self.study.num_self_generated, seed=self.study.seed)
            return self_generated_data(self.study.model, settings, device=self.study.device)
        if text == "instructions":
            return pl.load_instructions(self.study.instructions, limit=4000, seed=self.study.seed)
        return pl.load_text(text, "train")


def _settings(bench: Bench, case: Case, model: Any, data: Any) -> RecoverySettings:
    """As many steps as fit into the minutes, by the pace of a few."""
    assert case.method is not None
    own, taught = METHODS[case.method]
    given = {**COMMON, **own, "seed": bench.study.seed}
    ends: list[float] = []
    probe = RecoverySettings(**{**given, "max_steps": _PROBE_STEPS, "warmup_steps": 1})
    pl.recover(
        model, bench.dense[1], data, settings=probe, teacher=bench.dense[0] if taught else None,
        progress=False, on_step=lambda record: ends.append(time.perf_counter()),
    )  # fmt: skip
    pace = (ends[-1] - ends[0]) / (len(ends) - 1)
    minutes = bench.study.screen_minutes if case.screen else bench.study.minutes
    steps = max(_PROBE_STEPS, int(60 * minutes / pace))
    return RecoverySettings(**{**given, "max_steps": steps, "warmup_steps": max(1, steps // 20)})


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Recover if the case says so, and measure."""
    study = bench.study
    model = bench.dense[0] if case.cut == "dense" else bench.pruned(case)
    record: dict[str, Any] = {**asdict(case), "params": sum(p.numel() for p in model.parameters())}
    if case.method is not None and case.text is not None:
        data = bench.data(case.text)
        settings = _settings(bench, case, model, data)
        teacher = bench.dense[0] if METHODS[case.method][1] else None
        result = pl.recover(model, bench.dense[1], data, settings=settings, teacher=teacher, progress=False)
        model = result.model
        record.update(
            seconds=result.seconds, steps=len(result.history), tokens=result.num_tokens,
            losses=[round(loss, 4) for loss in result.losses],
        )  # fmt: skip
    record.update(measure(bench, model, study.screen_tokens if case.screen else study.test_tokens))
    if study.items and not case.screen:
        tasks = pl.zero_shot(model, bench.dense[1], limit=study.items, seed=study.seed, data="package")
        record.update(average=float(tasks.average), tasks=str(tasks))
    return record


def measure(bench: Bench, model: Any, test_tokens: int) -> dict[str, Any]:
    """Perplexity on WikiText-2, which is judged, and on the kinds of text that recovery may have seen."""
    found: dict[str, Any] = {}
    for source in ("wikitext2", "c4"):
        tokens = test_tokens if source == "wikitext2" else bench.study.screen_tokens
        words = pl.load_text(source, "test")
        result = pl.perplexity(model, bench.dense[1], words, max_tokens=tokens, source=f"{source} test")
        found["perplexity" if source == "wikitext2" else f"perplexity on {source}"] = float(result)
        found.setdefault("conditions", result.conditions)
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Rows with ratios to the dense model under the same test."""
    lines = [
        "| removed | compensated | recovery | on | minutes | tokens | PPL | / dense | c4 | average "
        "| / dense |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        ratio, average = _ratio(record, records, "perplexity"), _ratio(record, records, "average")
        c4 = _ratio(record, records, "perplexity on c4")
        cells = [
            record["cut"], "yes" if record["compensated"] else "no", record["method"] or "none",
            record["text"] or "–", f"{record['seconds'] / 60:.1f}" if "seconds" in record else "–",
            f"{record['tokens']:,}" if "tokens" in record else "–", f"{record['perplexity']:.2f}",
            f"{ratio:.3f}" if ratio else "–", f"{c4:.2f} ×" if c4 else "–",
            f"{record['average']:.4f}" if "average" in record else "–", f"{average:.3f}" if average else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The value over the dense model's, measured on as many tokens."""
    alike = [r for r in records if r["cut"] == "dense" and r["screen"] == record["screen"]]
    dense = next((r for r in alike if r["method"] is None), None)
    return record[key] / dense[key] if dense is not None and key in record and key in dense else None


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """For each goal, the best case on text that is not WikiText, and whether it is met."""
    lines = []
    for cut, (most, least) in GOALS.items():
        fair = [
            r for r in records if r["cut"] == cut and r["text"] not in (None, "wikitext2") and not r["screen"]
        ]
        minutes = {_label(r): r["seconds"] / 60 for r in fair}
        for key, goal, better in (("perplexity", most, min), ("average", least, max)):
            ratios = {_label(r): value for r in fair if (value := _ratio(r, records, key)) is not None}
            if goal is None or not ratios:
                continue
            name = better(ratios, key=lambda label: ratios[label])
            met = ratios[name] <= goal if key == "perplexity" else ratios[name] >= goal
            lines.append(
                f"- {cut} fewer, {key}: {ratios[name]:.3f} × dense ({name}, {minutes[name]:.1f} minutes); "
                f"the goal is {goal:.2f}: "
                f"{'met' if met else 'not met'}."
            )
    return "\n".join(lines)


def _label(record: Mapping[str, Any]) -> str:
    return Case(record["cut"], record["compensated"], record["method"], record["text"]).name


def write_page(study: Study, records: Sequence[Mapping[str, Any]]) -> None:
    """The page of the documentation, from what has been run so far."""
    whole = [record for record in records if not record["screen"]]
    screened = [record for record in records if record["screen"]]
    machines = "; ".join(dict.fromkeys(record["machine"] for record in records))
    page = [
        "# Recovery: what comes back in ten minutes",
        f"Written by `python studies/recovery.py`: {len(records)} of {len(cases())} cases, model "
        f"{study.model}, scores by `wanda` (at 20 % scaled to the loss) and compensation on c4, seed "
        f"{study.seed}; {machines}. "
        "PPL: WikiText-2 test in windows of 128. c4: perplexity there, times the dense model's. Average: the "
        f"seven tasks, {study.items} items each.",
        "## Texts",
        f"About {study.minutes:g} minutes each; PPL on {study.test_tokens:,} tokens. The row on wikitext2 "
        "is no recovery: it learnt from text of the test's own kind.",
        table(whole),
        verdict(records),
    ]
    if screened:
        page += [
            "## Methods",
            f"About {study.screen_minutes:g} minutes each, on {SCREENED_ON}; PPL on {study.screen_tokens:,} "
            "tokens.",
            table(screened),
        ]
    study.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(study.page, "\n\n".join(part for part in page if part) + "\n")


def run(study: Study, only: str = "") -> list[dict[str, Any]]:
    """Every case that has not been run, in order; the page after each."""
    records, bench = Records(study.records, study.settings()), Bench(study)
    return records.complete(
        cases(), lambda case: run_case(bench, case), lambda found: write_page(study, found), only
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    texts, times = ("model", "instructions"), ("minutes", "screen_minutes")
    numbers = ("num_self_generated", "test_tokens", "screen_tokens", "items", "seed")
    options = dict.fromkeys(texts, str) | dict.fromkeys(times, float) | dict.fromkeys(numbers, int)
    parser = study_parser(str(__doc__), "docs/recovery", Study, **options)
    parser.add_argument("--models", type=Path, default=Path("runs/recovery_study"))
    given = vars(parser.parse_args(arguments))
    only = given.pop("only")
    print(table(run(Study(**given), only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
