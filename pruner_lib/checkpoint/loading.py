"""Open a checkpoint folder; safetensors only, and every file checked first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.record import PROVENANCE_FILE, check_record
from pruner_lib.checkpoint.saving import CONFIG_FILE, recover_interrupted
from pruner_lib.pruning.layer_config import enable_per_layer_config

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_pruned(directory: str | os.PathLike[str], *, verify: bool = True) -> PreTrainedModel:
    """Open a checkpoint that :func:`save_pruned` wrote; logits are the same bit for bit.

    Args:
        directory: the folder.
        verify: compare every file with the SHA-256 that was saved (about a second per GB); False compares
            sizes alone. The model card may be edited, and files may be added.

    Returns:
        The model in evaluation mode, in the dtype in which it was saved, on the CPU.

    Raises:
        CheckpointError: the folder or a file in it is missing, truncated or altered, a weight has
            a wrong shape or is missing, or the folder holds pickled weights (never opened).
    """
    folder = Path(directory).absolute()
    recover_interrupted(folder)
    _check_folder(folder, verify)
    enable_per_layer_config()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name and shape
            dtype="auto",
        )
    except Exception as error:  # transformers raises errors of many kinds for a folder it cannot open
        raise CheckpointError(f"cannot open {folder}: {type(error).__name__}: {error}") from error
    model, report = opened
    _check_report(folder, report)
    return model.eval()


def _check_folder(folder: Path, verify: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled files ({', '.join(pickles[:4])}), which can run code when opened; "
            "they are never read. Remove them, or convert the model to safetensors"
        )
    _read_json(folder / CONFIG_FILE)
    names = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        names = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    for name in names:
        _check_weights(folder, name)
    check_record(folder, _read_json(folder / PROVENANCE_FILE), contents=verify)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no checkpoint: {path.name} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); save the model again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object; save the model again")
    return document


def _check_weights(folder: Path, name: str) -> None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f"{folder} is not whole: the weights {name} are missing; save the model again")
    try:
        with safe_open(path, framework="pt") as weights:  # reads the header and checks it against the length
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); save the model again") from error


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """transformers fills missing weights with random ones and only warns; here that is an error."""
    labels = {
        "missing_keys": "lacks the weights",
        "unexpected_keys": "has weights that the model has no place for:",
        "mismatched_keys": "has weights of the wrong shape:",
    }
    for key, words in labels.items():
        names = sorted(str(name) for name in report.get(key, ()))
        if names:
            raise CheckpointError(
                f"{folder} {words} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}; "
                "config.json and the weights are not of one model. Save the model again"
            )
