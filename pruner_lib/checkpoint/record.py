"""What a checkpoint folder says of itself: where it comes from, and the checksum of each of its files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from pruner_lib.assets.files import sha256_of
from pruner_lib.assets.manifest import load_manifest
from pruner_lib.assets.models import DEFAULT_MODEL
from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.twin import needs_library, twin_config

if TYPE_CHECKING:
    from pruner_lib.importance import ImportanceScores
    from pruner_lib.pruning.plan import PruningPlan

PROVENANCE_FILE = "provenance.json"
CARD_FILE = "README.md"
FORMAT = "pruner_lib.checkpoint"
NEEDS_LIBRARY = "import pruner_lib, then from_pretrained"
_CALIBRATION = ("source", "num_samples", "seq_len")


def provenance_of(
    model: PreTrainedModel,
    plan: PruningPlan | None,
    scores: ImportanceScores | None,
    notes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the model, its plan and its scores know of where they come from.

    Args:
        model: the pruned model; its configuration knows the folder or hub id it was loaded from.
        plan: knows the dense size.
        scores: know criterion, reduction, calibration and seed.
        notes: anything else, kept under ``"provenance"``; ``base_model`` and ``license`` in it win over
            what is found.

    Returns:
        A JSON document.

    Raises:
        CheckpointError: the notes are no JSON.
    """
    given = dict(notes or {})
    base, licence = _base_model(str(getattr(model.config, "_name_or_path", "") or ""))
    document: dict[str, Any] = {
        "format": FORMAT,
        "library_version": _version("pruner-lab"),
        "transformers_version": _version("transformers"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "opens_with": NEEDS_LIBRARY if needs_library(model.config) else "from_pretrained",
        "saved_as": (twin_config(model.config) or model.config).model_type,
        "base_model": given.get("base_model", base),
        "license": given.get("license", licence),
        "dense_parameters": None if plan is None else plan.params_before,
        "importance": None if scores is None else _importance(scores),
        "provenance": given,
    }
    try:
        json.dumps(document)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"provenance must be plain JSON (numbers, text, lists): {error}") from error
    return document


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source folder
        return "source"


def _importance(scores: ImportanceScores) -> dict[str, Any]:
    return {
        "criterion": scores.criterion,
        "reduction": scores.reduction,
        "calibration": {name: getattr(scores, name) for name in _CALIBRATION},
        "seed": scores.seed,
    }


def _base_model(name: str) -> tuple[str | None, str | None]:
    """Name and licence of what a model was loaded from; a folder is known by its name alone."""
    folder = Path(name)
    if not name or not folder.is_dir():
        is_hub_id = name.count("/") < 2 and not name.startswith((".", "~", "/"))
        return (name if is_hub_id else folder.name) or None, None
    if folder.name.startswith(f"{DEFAULT_MODEL}-"):
        return DEFAULT_MODEL, load_manifest()[DEFAULT_MODEL].license.split()[0]
    # Pruned before: what that was made from is what this is made from.
    earlier = _read_dict(folder / PROVENANCE_FILE)
    licence = earlier.get("license") or _license_in_card(folder / CARD_FILE)
    return earlier.get("base_model") or folder.name, licence


def _read_dict(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none to read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _license_in_card(card: Path) -> str | None:
    """The ``license`` entry of a model card's front matter."""
    if not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license: *[\"']?([\w.+-]+)", front, re.MULTILINE)
    return found[1] if found and front.startswith("---") else None


def write_record(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``provenance.json`` with the size and SHA-256 of every other file of a finished folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != PROVENANCE_FILE
    }
    text = json.dumps({**document, "files": files}, indent=1, ensure_ascii=False)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def check_record(folder: Path, document: Mapping[str, Any], *, contents: bool = True) -> None:
    """Compare a folder with its record.

    The model card may be edited, and files may be added; neither changes the model.

    Args:
        folder: the checkpoint.
        document: its ``provenance.json``.
        contents: read the files and compare checksums; False compares sizes alone.

    Raises:
        CheckpointError: the record is not one, or a file is missing, cut off or altered.
    """
    files = document.get("files")
    if document.get("format") != FORMAT or not isinstance(files, dict):
        raise CheckpointError(
            f"{folder / PROVENANCE_FILE} is damaged: it does not list the files of a checkpoint of this "
            "library; save the model again"
        )
    for name, expected in files.items():
        if name != CARD_FILE:
            _check_file(folder, name, expected, contents)


def _check_file(folder: Path, name: str, expected: Any, contents: bool) -> None:
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise CheckpointError(f"{folder / PROVENANCE_FILE} is damaged: it names {name!r}, outside the folder")
    if not path.is_file():
        raise CheckpointError(f"{folder} is not whole: {name} is missing; save the model again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        saved = expected["bytes"]
        raise CheckpointError(
            f"{path} is damaged: it has {size:,} bytes, saved were {saved:,}; save the model again"
        )
    if contents and sha256_of(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path} is damaged or was altered: its SHA-256 is not the one that was saved. Save the model "
            "again; to open an edited folder all the same, use AutoModelForCausalLM.from_pretrained"
        )


__all__ = ["CARD_FILE", "NEEDS_LIBRARY", "PROVENANCE_FILE", "check_record", "provenance_of", "write_record"]
