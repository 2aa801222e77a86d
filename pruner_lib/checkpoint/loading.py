"""Open a checkpoint folder; safetensors only, and every file checked first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruner_lib.checkpoint.compatibility import auto_problem
from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.record import PROVENANCE_FILE, check_record
from pruner_lib.checkpoint.saving import CONFIG_FILE, recover_interrupted
from pruner_lib.pruning.layer_config import enable_per_layer_config

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WEIGHTS = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"


def load_pruned(directory: str | os.PathLike[str], *, verify: bool = True) -> PreTrainedModel:
    """Open a checkpoint that :func:`save_pruned` wrote; logits are the same bit for bit.

    Args:
        directory: the folder.
        verify: compare every file with the SHA-256 that was saved (about a second per GB); False compares
            sizes alone. The model card may be edited, and files may be added.

    Returns:
        The model in evaluation mode, every parameter in the dtype in which it was saved, on the CPU.

    Raises:
        CheckpointError: the folder or a file in it is missing, truncated or altered, a weight has
            a wrong shape or is missing, the folder holds pickled weights (never opened), or transformers
            knows no such architecture.
    """
    folder = Path(directory).resolve()
    recover_interrupted(folder)
    _check_folder(folder, verify)
    config = _read_json(folder / CONFIG_FILE)
    if (problem := auto_problem(config.get("model_type"), config.get("architectures"))) is not None:
        raise CheckpointError(f"cannot open {folder}: {problem}")
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
    _give_own_dtypes(model, folder)
    return model.eval()


def _give_own_dtypes(model: PreTrainedModel, folder: Path) -> None:
    """transformers reads everything in one dtype; what was saved in another is read again as it is."""
    places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    places |= dict(model.named_buffers(remove_duplicate=False))
    for name in _weight_files(folder):
        with safe_open(folder / name, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (it is no mapping)
                place = places.get(key)
                saved = _DTYPES.get(weights.get_slice(key).get_dtype())
                if place is None or saved in (None, place.dtype):
                    continue
                tensor = weights.get_tensor(key)
                if tensor.shape == place.shape:
                    place.data = tensor


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
    for name in _weight_files(folder):
        _check_weights(folder, name)
    check_record(folder, _read_json(folder / PROVENANCE_FILE), contents=verify)


def _weight_files(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    return sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))


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
