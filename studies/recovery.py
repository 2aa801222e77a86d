"""How much of a pruned model comes back in ten minutes: ``python studies/recovery.py``

At 20 % fewer parameters, with and without compensation before it: LoRA and full training, from the text
alone, from the dense model as teacher, and from both; then the best of them on other texts, and at
half of the pruned layers' groups. Recovery on WikiText-2 train stands beside them, so that
adaptation to the test's own kind of text is seen and not mistaken for recovery.

Every case leaves one JSON file in the output folder, and none is run twice: stop it and start it again as
you like. The table is written after every case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pruner_lib import (
    discover,
    estimate_importance,
    evaluation,
    load_calibration,
    load_model,
    load_pruned,
    load_text,
    perplexity,
    plan_pruning,
    prune,
    recover,
    save_pruned,
)
from pruner_lib.assets import DEFAULT_MODEL, AssetError
from pruner_lib.assets.files import write_whole
from pruner_lib.recovery import Distillation, RecoverySettings
from pruner_lib.recovery.self_generated import SelfGeneration, self_generated_data
from pruner_lib.recovery.sources import load_instructions

# Each method: settings beside the common ones, and whether the dense model teaches.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"rank": 32, "alpha": 64, "learning_rate": 1e-3}, False),
    "lora + teacher": ({"rank": 32, "alpha": 64, "learning_rate": 1e-3}, True),
    "lora + teacher, half text": (
        {"rank": 32, "alpha": 64, "learning_rate": 1e-3, "distillation": Distillation(weight=0.5)},
        True,
    ),
    "full": ({"method": "full", "learning_rate": 3e-4}, False),
    "full + teacher": ({"method": "full", "learning_rate": 3e-4}, True),
}
# 1024 tokens a step, in rows that hold a question with its whole answer.
COMMON = {"batch_size": 4, "micro_batch": 4, "seq_len": 256, "schedule": "cosine", "template": "chat"}
BEST = "full + teacher"
TEXTS = ("self-generated", "c4", "books", "instructions", "wikitext2")
GOALS = {"20 %": (1.10, 0.97), "50 %": (None, 0.88)}  # perplexity / dense at most, average / dense at least
_PROBE_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    cut: str
    compensated: bool
    method: str | None
    text: str | None

    @property
    def name(self) -> str:
        parts = [self.cut, "compensated" if self.compensated else "plain", self.method, self.text]
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Study:
    """What to run it with; see the command's options."""

    output: Path
    page: Path
    model: str = DEFAULT_MODEL
    device: str | None = None
    minutes: float = 10.0
    plan: Mapping[str, Any] = field(default_factory=dict)
    criterion: str = "taylor_second"
    instructions: str = "alpaca"
    num_self_generated: int = 1000
    test_tokens: int = 65536
    zero_shot_limit: int = 100
    seed: int = 0

    def cases(self) -> list[Case]:
        """What can be compared here, in the order in which it tells most."""
        states = [True, False]
        found = [Case("dense", False, None, None)]
        found += [Case("20 %", state, None, None) for state in states]
        found += [Case("20 %", states[0], BEST, text) for text in TEXTS]
        found += [Case("20 %", s, m, "self-generated") for s in states for m in METHODS]
        found += [Case("50 %", states[0], None, None), Case("50 %", states[0], BEST, "self-generated")]
        return list(dict.fromkeys(found))


class Bench:
    """Models and texts, made once and kept in the output folder."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def dense(self) -> tuple[Any, Any]:
        return load_model(self.study.model, device=self.study.device)

    @cached_property
    def calibration(self) -> torch.Tensor:
        """Text of the kind that c4 is, never WikiText."""
        seed = self.study.seed
        return load_calibration(self.dense[1], source="c4", num_samples=256, seq_len=128, seed=seed)

    def pruned(self, case: Case) -> Any:
        folder = self.study.output / f"{case.cut.split()[0]}-{'compensated' if case.compensated else 'plain'}"
        if not (folder / "config.json").is_file():
            dense = self.dense[0]
            dependencies = discover(dense)
            scores = estimate_importance(
                dense, dependencies, self.calibration[:64], criterion=self.study.criterion, micro_batch_size=8
            )
            budget: dict[str, Any] = {"kinds": "mlp_neuron", **self.study.plan}
            if case.cut == "20 %":
                budget["target_params"] = 0.8
            else:  # half of the groups of the layers that the paper's range prunes: all but the outer ones
                budget.update(ratio=0.5, layers=range(4, dependencies.num_layers - 3))
            plan = plan_pruning(dependencies, scores, **budget)
            given: dict[str, Any] = {"compensate": self.calibration} if case.compensated else {}
            save_pruned(prune(dense, plan, **given), folder, tokenizer=self.dense[1], plan=plan)
        return load_pruned(folder).to(next(self.dense[0].parameters()).device)

    def data(self, text: str) -> Any:
        """Training data by the name in the table.

        Raises:
            AssetError: the instructions are not there.
        """
        if text == "self-generated":
            settings = SelfGeneration(num_examples=self.study.num_self_generated, seed=self.study.seed)
            return self_generated_data(self.study.model, settings, device=self.study.device)
        if text == "instructions":
            return load_instructions(self.study.instructions, limit=4000, seed=self.study.seed)
        return load_text(text, "train")


def _settings(bench: Bench, case: Case, model: Any, data: Any) -> RecoverySettings:
    """As many steps as fit into the minutes, by the pace of a few."""
    assert case.method is not None
    given = {**COMMON, **METHODS[case.method][0], "seed": bench.study.seed}
    ends: list[float] = []
    probe = RecoverySettings(**{**given, "max_steps": _PROBE_STEPS, "warmup_steps": 1})
    teacher = bench.dense[0] if METHODS[case.method][1] else None
    recover(
        model, bench.dense[1], data, settings=probe, teacher=teacher, progress=False,
        on_step=lambda record: ends.append(time.perf_counter()),
    )  # fmt: skip
    pace = (ends[-1] - ends[0]) / (len(ends) - 1)
    steps = max(_PROBE_STEPS, int(60 * bench.study.minutes / pace))
    return RecoverySettings(**{**given, "max_steps": steps, "warmup_steps": max(1, steps // 20)})


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Recover if the case says so, and measure."""
    model = bench.dense[0] if case.cut == "dense" else bench.pruned(case)
    record: dict[str, Any] = {**asdict(case), "params": sum(p.numel() for p in model.parameters())}
    if case.method is not None and case.text is not None:
        data = bench.data(case.text)
        settings = _settings(bench, case, model, data)
        teacher = bench.dense[0] if METHODS[case.method][1] else None
        result = recover(model, bench.dense[1], data, settings=settings, teacher=teacher)
        model = result.model
        record.update(
            seconds=result.seconds, steps=len(result.history), tokens=result.num_tokens, losses=result.losses
        )
    text = load_text("wikitext2", "test")
    found = perplexity(
        model, bench.dense[1], text, max_tokens=bench.study.test_tokens, source="wikitext2 test"
    )
    record.update(perplexity=float(found), conditions=found.conditions)
    zero_shot: Callable[..., Any] | None = getattr(evaluation, "zero_shot", None)
    if zero_shot is not None and bench.study.zero_shot_limit:
        tasks = zero_shot(model, bench.dense[1], limit=bench.study.zero_shot_limit)
        record.update(average=float(tasks.average), tasks=str(tasks))
    return record


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Rows with ratios to the dense model, and what was reached."""
    dense = next((r for r in records if r["cut"] == "dense"), None)
    lines = [
        "| removed | compensated | recovery | on | minutes | tokens | PPL | / dense | average | / dense |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        ratio = _ratio(record, dense, "perplexity")
        average = _ratio(record, dense, "average")
        cells = [
            record["cut"], "yes" if record["compensated"] else "no", record["method"] or "none",
            record["text"] or "–", f"{record['seconds'] / 60:.1f}" if "seconds" in record else "–",
            f"{record['tokens']:,}" if "tokens" in record else "–", f"{record['perplexity']:.2f}",
            f"{ratio:.3f}" if ratio else "–",
            f"{record['average']:.4f}" if "average" in record else "–", f"{average:.3f}" if average else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(record: Mapping[str, Any], dense: Mapping[str, Any] | None, key: str) -> float | None:
    return record[key] / dense[key] if dense is not None and key in record and key in dense else None


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """For each goal, the best case on text that is not WikiText, and whether it is met."""
    dense = next((r for r in records if r["cut"] == "dense"), None)
    lines = []
    for cut, (most, least) in GOALS.items():
        fair = [r for r in records if r["cut"] == cut and r["text"] not in (None, "wikitext2")]
        for key, goal, better in (("perplexity", most, min), ("average", least, max)):
            ratios = {_label(r): value for r in fair if (value := _ratio(r, dense, key)) is not None}
            if goal is None or not ratios:
                continue
            name = better(ratios, key=lambda label: ratios[label])
            met = ratios[name] <= goal if key == "perplexity" else ratios[name] >= goal
            lines.append(
                f"- {cut} fewer, {key}: {ratios[name]:.3f} × dense ({name}); the goal is {goal:.2f}: "
                f"{'met' if met else 'not met'}."
            )
    return "\n".join(lines)


def _label(record: Mapping[str, Any]) -> str:
    return Case(record["cut"], record["compensated"], record["method"], record["text"]).name


def write_page(study: Study, records: Sequence[Mapping[str, Any]]) -> None:
    """The page of the documentation, from what has been run so far."""
    conditions = "; ".join(dict.fromkeys(record["conditions"] for record in records))
    page = [
        "# Recovery: what comes back in ten minutes",
        f"Written by `python studies/recovery.py`: {len(records)} of {len(study.cases())} cases, model "
        f"{study.model}, scores {study.criterion} on c4, at most {study.minutes:g} minutes each, "
        f"{torch.get_num_threads()} threads, seed {study.seed}. Perplexity: {conditions}. Average: the seven "
        f"tasks, {study.zero_shot_limit} items each (0: not measured).",
        table(records),
        verdict(records),
        "The row on wikitext2 is no recovery: it learnt from text of the test's own kind.",
    ]
    study.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(study.page, "\n\n".join(part for part in page if part) + "\n")


def run(study: Study) -> list[dict[str, Any]]:
    """Every case that has not been run, in order; the page after each."""
    study.output.mkdir(parents=True, exist_ok=True)
    bench, records = Bench(study), []
    for number, case in enumerate(study.cases(), start=1):
        file = study.output / f"{case.name.replace(' ', '').replace('%', '')}.json"
        if not file.is_file():
            print(f"[{number}/{len(study.cases())}] {case.name}", flush=True)
            try:
                record = run_case(bench, case)
            except AssetError as error:
                print(f"  left out: {error}", flush=True)
                continue
            write_whole(file, json.dumps(record) + "\n")
            print(
                f"  perplexity {record['perplexity']:.2f}, average {record.get('average', '–')}", flush=True
            )
        records.append(json.loads(file.read_text(encoding="utf-8")))
        write_page(study, records)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/recovery_study"))
    parser.add_argument("--page", type=Path, default=Path("docs/recovery_study.md"))
    parser.add_argument("--plan", type=json.loads, default={}, help='JSON for plan_pruning: {"preset": "…"}')
    for name in ("model", "criterion", "instructions"):
        parser.add_argument(f"--{name}", default=getattr(Study, name), help="(default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--minutes", type=float, default=Study.minutes, help="(default: %(default)s)")
    for name in ("num_self_generated", "test_tokens", "zero_shot_limit", "seed"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(Study, name), help="(default: %(default)s)")
    study = Study(**vars(parser.parse_args(arguments)))
    print(table(run(study)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
