"""Run the stages of a configuration, each once; a second start goes on where the first one stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pruner_lib import evaluation
from pruner_lib.assets import TEXT_SOURCES, load_calibration, load_model, load_text
from pruner_lib.assets.files import write_whole
from pruner_lib.checkpoint import load_pruned, save_pruned
from pruner_lib.discovery import DependencyMap, discover
from pruner_lib.evaluation import evaluate
from pruner_lib.importance import ImportanceScores, estimate_importance, scale_to_loss
from pruner_lib.pipeline.config import PipelineConfig, PipelineError
from pruner_lib.pipeline.processes import call, is_called, open_store
from pruner_lib.pruning import PruningPlan, plan_pruning, prune
from pruner_lib.pruning.planning import resolved
from pruner_lib.recovery import InterruptedRecoveryError, RecoveryResult, recover
from pruner_lib.recovery.self_generated import self_generated_data
from pruner_lib.recovery.sources import load_instructions

STAGES = ("discover", "score", "plan", "prune", "data", "recover", "evaluate")
# Tables of the file on which each stage's result depends, beside those of the stages before it.
_DEPENDS = {
    "discover": ("model",),
    "score": ("calibration", "importance"),
    "plan": ("plan",),
    "prune": ("prune",),
    "data": (),
    "recover": ("recover",),
    "evaluate": ("evaluate",),
}
_STATE = "run.json"


def run_pipeline(
    config: PipelineConfig, *, fresh: bool = False, report: Callable[[str], object] = print
) -> Path:
    """Discover, score, plan, prune, recover and evaluate, as far as the file asks for it.

    Under ``torchrun`` the first process runs every stage. The others wait for its word and join it in the
    recovery; all see the same output folder.

    Args:
        config: what :func:`read_config` returned.
        fresh: run every stage again.
        report: called with one line per stage.

    Returns:
        The output folder.

    Raises:
        PipelineError: something a stage asks for is not there.
        ValueError, AssetError: what the stages themselves refuse.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    run = _Run(config, fresh)
    # Kept open to the end: where the first process serves it, the others train over it.
    store = open_store() if processes > 1 and config.has("recover") else None
    if rank:
        if store is not None and is_called(store):
            run.recover()
        return config.output
    config.output.mkdir(parents=True, exist_ok=True)
    if fresh:
        (config.output / _STATE).unlink(missing_ok=True)
    for stage in run.stages():
        done = run.is_done(stage)
        if store is not None and stage == "recover":
            call(store, processes - 1, recover=not done)
        if done:
            report(f"{stage}: done before")
            continue
        began = time.perf_counter()
        line = getattr(run, stage)()
        run.mark(stage)
        report(f"{stage}: {line} ({time.perf_counter() - began:.0f} s)")
    return config.output


class _Run:
    """The stages as methods; what one needs of an earlier one is in memory or read from its files."""

    def __init__(self, config: PipelineConfig, fresh: bool) -> None:
        self._config, self._folder, self._fresh = config, config.output, fresh
        self._made: dict[str, Any] = {}

    def stages(self) -> list[str]:
        """Those the file asks for, in order."""
        planned, wanted = self._config.has("plan"), ["discover"]
        wanted += ["score", "plan", "prune"] if planned else []
        wanted += ["data"] if self._generates() else []
        return wanted + [stage for stage in ("recover", "evaluate") if self._config.has(stage)]

    def _generates(self) -> bool:
        return self._config.table("recover").get("data") == "self-generated"

    def _fingerprint(self, stage: str) -> str:
        tables = [table for s in STAGES[: STAGES.index(stage) + 1] for table in _DEPENDS[s]]
        content: dict[str, Any] = {table: self._config.table(table) for table in tables}
        if stage == "data":
            content["data"] = asdict(self._config.self_generation())
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _state(self) -> dict[str, str]:
        try:
            state: dict[str, str] = json.loads((self._folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state

    def is_done(self, stage: str) -> bool:
        """Whether the folder holds this stage's result for this configuration."""
        return self._state().get(stage) == self._fingerprint(stage)

    def mark(self, stage: str) -> None:
        """Note that it does; what later stages left there is of another configuration."""
        kept = {s: f for s, f in self._state().items() if STAGES.index(s) < STAGES.index(stage)}
        state = {**kept, stage: self._fingerprint(stage)}
        write_whole(self._folder / _STATE, json.dumps(state, indent=1) + "\n")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        given = self._config.table("model")
        local = os.environ.get("LOCAL_RANK")
        if local is not None and given.get("device") in (None, "cuda"):
            import torch

            given["device"] = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
        return load_model(self._config.model_name, **{k: v for k, v in given.items() if k != "name"})

    @property
    def _dense(self) -> nn.Module:
        model: nn.Module = self._loaded[0]
        return model

    @cached_property
    def _batches(self) -> Tensor:
        return load_calibration(self._loaded[1], **self._config.table("calibration"))

    def _more_batches(self, count: int) -> Tensor:
        """Other windows of the calibration's text."""
        given = self._config.table("calibration")
        given |= {"num_samples": count, "seed": given.get("seed", 0) + 1}
        return load_calibration(self._loaded[1], **given)

    @cached_property
    def _map(self) -> DependencyMap:
        return discover(self._dense)

    def discover(self) -> str:
        write_whole(self._folder / "discovery.txt", f"{self._map}\n")
        return f"{len(self._map.families)} families"

    def score(self) -> str:
        given = self._config.table("importance")
        given.pop("scale_to_loss", None)
        scaling = self._config.scaling(self._more_batches)
        source = str(self._config.table("calibration").get("source", "wikitext2"))
        scores = estimate_importance(self._dense, self._map, self._batches, source=source, **given)
        if scaling is not None:
            families = self._planned(scores)
            scores = scale_to_loss(
                self._dense, self._map, scores, self._batches[:16], families=families, **scaling
            )
        scores.save(self._folder / "scores.json")
        return f"{scores.criterion} over {scores.num_samples} × {scores.seq_len} tokens"

    def _planned(self, scores: ImportanceScores) -> list[str]:
        """Families with scores that the plan may touch."""
        given = self._config.plan_arguments()
        kinds = resolved(*(given.get(name) for name in ("preset", "scope", "kinds", "ranking"))).kinds
        return [family.name for family in self._map.select(kind=kinds) if family.name in scores]

    def plan(self) -> str:
        scores = ImportanceScores.load(self._folder / "scores.json")
        plan = plan_pruning(self._map, scores, **self._config.plan_arguments())
        plan.save(self._folder / "plan.json")
        return f"{plan.params_before:,} -> {plan.params_after:,} parameters"

    @property
    def _plan(self) -> PruningPlan:
        return PruningPlan.load(self._folder / "plan.json", self._map)

    def prune(self) -> str:
        plan = self._plan
        self._made["pruned"] = prune(
            self._dense, plan, compensate=self._config.compensation(self._more_batches)
        )
        self._save(self._made["pruned"], "pruned", plan)
        return f"saved in {self._folder / 'pruned'}"

    def _save(self, model: Any, name: str, plan: PruningPlan | None) -> None:
        origin = {"base_model": self._config.model_name, "configuration": dict(self._config.tables)}
        origin = json.loads(json.dumps(origin, default=str))
        save_pruned(model, self._folder / name, tokenizer=self._loaded[1], plan=plan, provenance=origin)

    def _model(self, name: str) -> nn.Module:
        """The dense, pruned or recovered model, on the dense one's device."""
        if name == "dense" or (name == "pruned" and not self._config.has("plan")):
            return self._dense
        if name not in self._made:
            self._made[name] = load_pruned(self._folder / name)
        model: nn.Module = self._made[name].to(next(self._dense.parameters()).device)
        return model

    def data(self) -> str:
        return f"{len(self._data('self-generated'))} answers of the dense model"

    def recover(self) -> str:
        given = self._config.table("recover")
        settings = self._config.recovery_settings()
        # A folder of its own for each configuration: another one's checkpoints stay whole beside it.
        folder = self._folder / "recovery" / self._fingerprint("recover")[:8]
        held_out = given.get("held_out")
        try:
            result: RecoveryResult = recover(
                self._model("pruned"),
                self._loaded[1],
                self._data(given["data"]),
                settings=settings,
                teacher=self._loaded if given.get("teacher") else None,
                held_out=None if held_out is None else self._text(held_out, "validation"),
                output_dir=folder,
                resume=bool(settings.checkpoint_every) and not self._fresh,
            )
        except InterruptedRecoveryError as error:
            self._save(error.result.model, "interrupted", None)
            raise PipelineError(
                f"{error} The state that was kept is in {self._folder / 'interrupted'}"
            ) from error
        self._made["recovered"] = result.model
        if int(os.environ.get("RANK", "0")) == 0:
            self._save(result.model, "recovered", self._plan if self._config.has("plan") else None)
            lines = "".join(json.dumps(dict(record)) + "\n" for record in result.history)
            write_whole(folder / "history.jsonl", lines)
        return str(result)

    def _data(self, source: str) -> Any:
        """Self-generated answers, a text by name, or instructions."""
        if source == "self-generated":
            device = str(next(self._dense.parameters()).device)
            settings = self._config.self_generation()
            return self_generated_data(self._config.model_name, settings, device=device)
        name = source.partition(":")[0]
        if name in TEXT_SOURCES or source.endswith(".txt"):
            return self._text(source, "train")
        return load_instructions(source)

    def _text(self, source: str, usual: str) -> str:
        """``name`` or ``name:split``, with the split that it is usually for where none is said."""
        name, _, split = source.partition(":")
        return load_text(name, split or usual)

    def evaluate(self) -> str:
        given = self._config.table("evaluate")
        zero_shot = given.pop("zero_shot", None)
        sources = given.pop("text", [])
        texts = {s: self._text(s, "test") for s in ([sources] if isinstance(sources, str) else sources)}
        names = ["dense", *(["pruned"] if self._config.has("plan") else [])]
        names += ["recovered"] if self._config.has("recover") else []
        models = {name: self._model(name) for name in names}
        found = evaluate(models, self._loaded[1], text=texts or None, **given)
        found.save(self._folder / "report.json")
        pages = [found.to_markdown()]
        if zero_shot is not None:
            pages.append(self._zero_shot(models, zero_shot))
        write_whole(self._folder / "report.md", "\n".join(pages))
        return f"written to {self._folder / 'report.md'}\n" + "\n".join(pages)

    def _zero_shot(self, models: dict[str, nn.Module], given: dict[str, Any]) -> str:
        zero_shot = getattr(evaluation, "zero_shot", None)
        if zero_shot is None:
            raise PipelineError("[evaluate.zero_shot]: this version has no zero-shot tasks; leave it out")
        results = {name: zero_shot(model, self._loaded[1], **given) for name, model in models.items()}
        averages = {name: float(result.average) for name, result in results.items()}
        write_whole(self._folder / "zero_shot.json", json.dumps(averages, indent=1) + "\n")
        return "\n".join(f"### {name}\n\n```\n{result}\n```\n" for name, result in results.items())
