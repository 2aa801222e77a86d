"""The configuration file: one table per stage, each key checked against what the stage takes."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruner_lib.assets import DEFAULT_MODEL, load_calibration, load_model
from pruner_lib.assets.errors import suggestion
from pruner_lib.evaluation import evaluate
from pruner_lib.importance import estimate_importance, scale_to_loss
from pruner_lib.importance.loss_scale import check_scaling
from pruner_lib.pruning import Compensation, plan_pruning
from pruner_lib.recovery import Distillation, RecoverySettings
from pruner_lib.recovery.self_generated import SelfGeneration

EXAMPLE = """\
# python -m pruner_lib this-file.toml
# torchrun --nproc-per-node 8 -m pruner_lib this-file.toml      the recovery on eight processes
# Only the tables that are here are run; a stage that is done is not run again.

output = "runs/example"                 # scores.json, plan.json, pruned/, recovered/, report.md …

[model]                                 # what load_model takes
name = "SmolLM2-135M-Instruct"          # or a hub id, or a folder

[calibration]                           # what load_calibration takes; for scores and compensation
source = "c4"
num_samples = 64
seq_len = 128

[importance]                            # what estimate_importance takes
criterion = "taylor_second"
micro_batch_size = 8

[importance.scale_to_loss]              # measure what families cost, in nats; preset = "best" needs it
measure = "divergence"
ratio = [0.33, 0.67]
compensate = 128                        # after their readers are fitted again on so many windows

[plan]                                  # what plan_pruning takes; layers = "4-26" counts from 0
target_params = 0.8
preset = "best"

[prune.compensate]                      # fit what reads the removed channels again; leave out for a plain cut
num_samples = 256                       # windows of calibration text; the rest are fields of Compensation

[recover]
data = "self-generated"                 # or "alpaca", a .jsonl file, or a text such as "c4:train"
teacher = "dense"                       # leave out to learn from the text alone
held_out = "c4:validation"              # perplexity while training; the best state is kept
paper = false                           # true: start from the paper's settings

[recover.settings]                      # fields of RecoverySettings
max_steps = 100
template = "chat"
checkpoint_every = 25                   # an interrupted run goes on from here

[recover.distillation]                  # fields of Distillation
weight = 1.0

[recover.self_generated]                # fields of SelfGeneration
num_examples = 500

[evaluate]                              # what evaluate takes, on dense, pruned and recovered model
text = ["wikitext2:test"]
seq_len = 128

[evaluate.zero_shot]                    # what zero_shot takes; leave the table out to skip it
limit = 60
"""

_TABLES = ("model", "calibration", "importance", "plan", "prune", "recover", "evaluate")


class PipelineError(ValueError):
    """The configuration cannot be run; the message says which key and what would be valid."""


@dataclass(frozen=True)
class PipelineConfig:
    """A checked configuration.

    Attributes:
        output: folder for everything the run makes.
        tables: keyword arguments per stage, as the file has them.
    """

    output: Path
    tables: Mapping[str, Mapping[str, Any]]

    def has(self, table: str) -> bool:
        """Whether the stage is asked for."""
        return table in self.tables

    def table(self, name: str) -> dict[str, Any]:
        """The stage's arguments; empty if it has none."""
        return dict(self.tables.get(name, {}))

    @property
    def model_name(self) -> str:
        """Name, hub id or folder of the dense model."""
        return str(self.table("model").get("name", DEFAULT_MODEL))

    def recovery_settings(self) -> RecoverySettings:
        """``[recover.settings]`` and ``[recover.distillation]`` over the laptop's or the paper's defaults."""
        recover = self.table("recover")
        given = {key: _tuple(value) for key, value in recover.get("settings", {}).items()}
        given["distillation"] = Distillation(**recover.get("distillation", {}))
        if recover.get("paper"):
            return RecoverySettings.paper(**given)
        if given.get("epochs") is not None:
            given.setdefault("max_steps", None)
        return RecoverySettings(**given)

    def self_generation(self) -> SelfGeneration:
        """``[recover.self_generated]``."""
        return SelfGeneration(**self.table("recover").get("self_generated", {}))

    def compensation(self, load: Callable[[int], Tensor]) -> Compensation | None:
        """``[prune.compensate]``, with as many windows of text as it says; None for a plain cut."""
        given = dict(self.table("prune").get("compensate", {}))
        if "compensate" not in self.table("prune"):
            return None
        count = given.pop("num_samples", self.table("calibration").get("num_samples", 64))
        return Compensation(load(count), **{key: _tuple(value) for key, value in given.items()})

    def scaling(self, load: Callable[[int], Tensor]) -> dict[str, Any] | None:
        """``[importance] scale_to_loss``: true, or a table of what ``scale_to_loss`` takes; None without."""
        given = self.table("importance").get("scale_to_loss", False)
        if not isinstance(given, dict):
            return {} if given else None
        found = {key: _tuple(value) for key, value in given.items()}
        if "compensate" in found:
            found["compensate"] = load(found["compensate"])
        return found

    def plan_arguments(self) -> dict[str, Any]:
        """``[plan]`` with ``layers = "4-26"`` as a range."""
        given = self.table("plan")
        if isinstance(given.get("layers"), str):
            given["layers"] = _range(given["layers"])
        return given


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _range(text: str) -> range:
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdigit() and last.strip().isdigit()):
        raise PipelineError(
            f'[plan] layers = {text!r}: give "first-last", such as "4-26", or a list of numbers'
        )
    return range(int(first), int(last) + 1)


def read_config(path: str | Path, *, output: str | Path | None = None) -> PipelineConfig:
    """Read and check a TOML or JSON file.

    Args:
        path: the file.
        output: another folder than the file says.

    Raises:
        PipelineError: no such file, not TOML or JSON, an unknown table or key, a stage without the one
            it needs, a value that a settings object refuses.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise PipelineError(f"cannot read {path}: {error}; see python -m pruner_lib --example") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} must hold tables, one per stage; see python -m pruner_lib --example")
    folder = output or content.pop("output", None) or Path("runs") / path.stem
    content.pop("output", None)
    _known(content, _TABLES, "the file", "table")
    for name, table in content.items():
        if not isinstance(table, dict):
            raise PipelineError(f"{name} must be a table, [{name}], not {table!r}")
        _known(table, _allowed(name), f"[{name}]", "key")
    config = PipelineConfig(Path(folder), content)
    _check_order(config)
    _check_values(config)
    return config


def _allowed(table: str) -> Collection[str]:
    keywords: dict[str, tuple[Callable[..., Any], set[str]]] = {
        "model": (load_model, set()),
        "calibration": (load_calibration, {"tokenizer"}),
        "importance": (estimate_importance, {"model", "dependencies", "batches", "source"}),
        "plan": (plan_pruning, {"dependencies", "scores"}),
        "evaluate": (evaluate, {"models", "tokenizer"}),
    }
    if table == "prune":
        return {"compensate"}
    if table == "recover":
        return {"data", "teacher", "held_out", "paper", "settings", "distillation", "self_generated"}
    function, supplied = keywords[table]
    extra = {"evaluate": {"zero_shot"}, "importance": {"scale_to_loss"}}.get(table, set())
    return (set(inspect.signature(function).parameters) - supplied) | extra


def _known(given: Iterable[str], known: Collection[str], where: str, what: str) -> None:
    for name in given:
        if name not in known:
            raise PipelineError(
                f"{where} has an unknown {what} {name!r}.{suggestion(name, known)} "
                f"Valid: {', '.join(sorted(known))}"
            )


def _check_order(config: PipelineConfig) -> None:
    if config.has("prune") and not config.has("plan"):
        raise PipelineError("[prune] needs a [plan]; say there how much is to be removed")
    if config.has("importance") and not config.has("plan"):
        raise PipelineError("[importance] needs a [plan] that uses the scores")
    if config.has("recover") and not config.table("recover").get("data"):
        raise PipelineError(
            '[recover] needs data: "self-generated", "alpaca", a .jsonl file, or a text such as "c4"'
        )
    recover = config.table("recover")
    for name in ("data", "held_out"):
        if not isinstance(recover.get(name, ""), str):
            raise PipelineError(f"[recover] {name} must name a text or a file, not {recover[name]!r}")
    if "held_out" in recover and _with_split(recover["held_out"], "validation") == _with_split(
        recover["data"], "train"
    ):
        raise PipelineError(
            f"[recover] held_out {recover['held_out']!r} is the text that is learnt from; give another split "
            f"of it, {recover['data'].partition(':')[0]}:validation, or another text"
        )
    if not isinstance(recover.get("paper", False), bool):
        raise PipelineError(f"[recover] paper must be true or false, not {recover['paper']!r}")
    teacher = config.table("recover").get("teacher", "dense")
    if teacher != "dense":
        raise PipelineError(f'[recover] teacher must be "dense" or left out, got {teacher!r}')


def _with_split(source: str, usual: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return name, split or usual


def _count(given: Any, where: str) -> None:
    """A number of windows."""
    if not isinstance(given, int) or isinstance(given, bool) or given < 2:
        raise PipelineError(
            f"{where} = {json.dumps(given, default=str)}: it is how many windows of text the fit sees, 2 or "
            "more"
        )


def _check_values(config: PipelineConfig) -> None:
    fields_of = {field.name for field in fields(Compensation)} - {"batches", "progress"}
    compensate = config.table("prune").get("compensate", {})
    if not isinstance(compensate, dict):
        raise PipelineError(
            f"[prune] compensate must be a table, [prune.compensate], not {compensate!r}; its keys: "
            f"num_samples, {', '.join(sorted(fields_of))}"
        )
    _known(compensate, {"num_samples", *fields_of}, "[prune.compensate]", "key")
    _count(compensate.get("num_samples", 2), "[prune.compensate] num_samples")
    try:
        config.compensation(lambda count: torch.zeros(2, 2, dtype=torch.long))
    except (TypeError, ValueError) as error:
        raise PipelineError(f"[prune.compensate] {error}") from error
    scaling = config.table("importance").get("scale_to_loss", False)
    valid = set(inspect.signature(scale_to_loss).parameters)
    valid -= {"model", "dependencies", "scores", "batches", "families", "progress"}
    if not isinstance(scaling, bool | dict):
        raise PipelineError(
            f"[importance] scale_to_loss must be true, false or a table, [importance.scale_to_loss], not "
            f"{scaling!r}; its keys: {', '.join(sorted(valid))}"
        )
    if isinstance(scaling, dict):
        _known(scaling, valid, "[importance.scale_to_loss]", "key")
        _count(scaling.get("compensate", 2), "[importance.scale_to_loss] compensate")
        try:
            check_scaling(**{key: _tuple(value) for key, value in scaling.items() if key != "compensate"})
        except (TypeError, ValueError) as error:
            raise PipelineError(f"[importance.scale_to_loss] {error}") from error
    recover = config.table("recover")
    for name, kind in (
        ("settings", RecoverySettings), ("distillation", Distillation), ("self_generated", SelfGeneration),
    ):  # fmt: skip
        names = {field.name for field in fields(kind)} - {"distillation"}
        table = recover.get(name, {})
        if not isinstance(table, dict):
            raise PipelineError(f"[recover] {name} must be a table, [recover.{name}], not {table!r}")
        _known(table, names, f"[recover.{name}]", "key")
    try:
        config.recovery_settings()
        config.self_generation()
    except (TypeError, ValueError) as error:
        raise PipelineError(f"[recover] {error}") from error
    config.plan_arguments()
