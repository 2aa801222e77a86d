"""Write a checkpoint folder whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pruner_lib.checkpoint.checks import check_saveable
from pruner_lib.checkpoint.compatibility import compatibility
from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.model_card import Quality, QualityReport, model_card
from pruner_lib.checkpoint.record import CARD_FILE, PROVENANCE_FILE, provenance_of, write_record
from pruner_lib.checkpoint.twin import twin_config

if TYPE_CHECKING:
    from pruner_lib.importance import ImportanceScores
    from pruner_lib.pruning.plan import PruningPlan

CONFIG_FILE = "config.json"
PLAN_FILE = "pruning_plan.json"
QUALITY_FILE = "evaluation.json"


def save_pruned(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    plan: PruningPlan | None = None,
    scores: ImportanceScores | None = None,
    quality: Quality | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Save a pruned model as safetensors with its configuration.

    A model with one width in all layers opens with plain ``AutoModelForCausalLM.from_pretrained``; where
    LlamaConfig refuses the head count, it is saved as the mistral model that computes the same.
    One whose layers differ opens the same way once ``pruner_lib`` is imported, and raises without it.
    Every parameter is saved in the dtype it has; where these are several, :func:`load_pruned` gives each its
    own back, while plain ``from_pretrained`` makes them one, of which a warning tells.
    The folder is written beside its final place and takes its name in one step: whenever the program
    is killed, ``directory`` holds the old checkpoint or the new one, whole. (Where the system cannot
    exchange two folders, the old one waits under ``.<directory>.old`` between two renames; the next
    ``save_pruned`` or ``load_pruned`` brings it back.)

    Beside the model lie a model card ``README.md`` and ``provenance.json``, which holds what the model, the
    plan and the scores know of their making and the SHA-256 of every file.

    >>> save_pruned(pruned, "runs/pruned", tokenizer=tokenizer, plan=plan, scores=scores)

    Args:
        model: what ``prune`` or ``recover`` returned.
        directory: a new folder, an empty one, or an earlier checkpoint, which is replaced. Where it is a
            link, the folder that it leads to.
        tokenizer: saved beside the model if given.
        plan: saved as ``pruning_plan.json`` if given.
        scores: what the plan was made from; criterion, reduction, calibration and seed are recorded.
        quality: an evaluation report, saved as ``evaluation.json``, or numbers by name; for the model card.
        provenance: what else should be known (recovery, remarks); any JSON. ``base_model`` and ``license``
            in it correct what is found out.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something else, is the current directory or holds it, the plan is
            another model's, the configuration cannot describe the model, the weights are on the meta device,
            or the provenance is no JSON.
        OSError: the disk is full or not writable; what was there is still whole.
    """
    target = Path(directory).resolve()
    recover_interrupted(target)
    _check_target(target)
    check_saveable(model)
    _check_plan(model, plan)
    _warn_of_dtypes(model)
    document = provenance_of(model, plan, scores, provenance)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_new_name(target)}{os.getpid()}-"))
    try:
        _write(model, temporary, tokenizer, plan)
        card = model_card(model, document, plan, quality, elsewhere=compatibility(model).to_markdown())
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        if isinstance(quality, QualityReport):
            quality.save(temporary / QUALITY_FILE)
        write_record(temporary, document)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private; a result is an ordinary folder
        _flush(temporary)
        _swap(temporary, target)
    except SafetensorError as error:  # its own kind of error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write the weights below {target.parent}: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Path(directory)


def recover_interrupted(target: Path) -> None:
    """Tidy up after a program that was killed while it saved.

    Its half-written folder goes, and where it died between the two renames of a replacement the old
    checkpoint comes back.
    """
    for left in target.parent.glob(f"{_new_name(target)}*-*") if target.parent.is_dir() else ():
        process = left.name.removeprefix(_new_name(target)).split("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    old = _old_name(target)
    if not old.is_dir():
        return
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(old, target)


def _old_name(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _new_name(target: Path) -> str:
    """Beginning of the name of a half-written folder; this machine and the process number follow."""
    return f".{target.name}.new-{re.sub('[^A-Za-z0-9.]', '_', platform.node())}."


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 asks on POSIX and kills elsewhere
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"cannot save into {target}: it is a file; give a folder")
    here = Path.cwd().resolve()
    if target in (here, *here.parents):
        what = "is the current directory" if target == here else f"holds the current directory {here}"
        raise CheckpointError(
            f"cannot save into {target}: it {what}, and the folder is replaced as a whole, which would leave "
            "this program in one that is gone; give a folder inside it, such as 'pruned'"
        )
    if any(target.iterdir()) and not (target / PROVENANCE_FILE).is_file():
        found = ", ".join(sorted(path.name for path in target.iterdir())[:4])
        raise CheckpointError(
            f"cannot save into {target}: it holds files that are no checkpoint of this library ({found}); "
            "give a new or empty folder, or one that save_pruned wrote"
        )


def _warn_of_dtypes(model: PreTrainedModel) -> None:
    """Plain from_pretrained gives all parameters one dtype, but those that the class keeps in float32."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if model.dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    others = {
        name: str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != model.dtype
        if parameter.dtype != torch.float32 or not any(part in name for part in kept)
    }
    if others:
        name, dtype = next(iter(others.items()))
        common = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"the parameters are of several dtypes: {len(others)} are not {common} (the first is {name}, "
            f"{dtype}). load_pruned gives each its own back; plain from_pretrained makes all of them "
            f"{common}. To have the same from both, convert the model first: model.to(torch.{common})",
            stacklevel=3,  # the caller of save_pruned
        )


def _check_plan(model: PreTrainedModel, plan: PruningPlan | None) -> None:
    found = sum(parameter.numel() for parameter in model.parameters())
    if plan is not None and plan.params_after != found:
        raise CheckpointError(
            f"the plan leaves {plan.params_after:,} parameters, the model has {found:,}: it was not cut by "
            "this plan. Give the plan that prune made it with, or none"
        )


def _write(model: PreTrainedModel, folder: Path, tokenizer: Any, plan: PruningPlan | None) -> None:
    before = dict(vars(model.config))
    try:
        model.save_pretrained(folder, safe_serialization=True)
    finally:  # it notes class and dtype in the caller's configuration
        vars(model.config).clear()
        vars(model.config).update(before)
    # Entries equal to the class's default are left out by save_pretrained, and some defaults are
    # derived from others when read (head_dim from the head count), so every entry is written.
    config = twin_config(model.config) or model.config
    complete = json.loads(config.to_json_string(use_diff=False))
    if config is model.config:
        complete |= json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    complete["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / CONFIG_FILE).write_text(json.dumps(complete, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    type(config).from_pretrained(folder)  # what was written must be read
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if plan is not None:
        plan.save(folder / PLAN_FILE)


def _flush(folder: Path) -> None:
    """Bring the files, and their names, to the disk before the folder takes its own."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
    elif _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        old = _old_name(target)
        os.replace(target, old)
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step, where the system can (Linux); False where it cannot."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
