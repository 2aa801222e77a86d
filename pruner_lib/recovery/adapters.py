"""LoRA on a copy of a model: attach, save, merge."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.settings import RecoverySettings

if TYPE_CHECKING:
    from peft import PeftModel


def linear_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of all linear layers but the output head, told by their type and not by their names.

    ``nn.Linear`` and GPT-2's ``Conv1D`` count.
    """
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    )


def require_no_adapter(model: nn.Module) -> None:
    """Refuse a model that already carries an adapter.

    Raises:
        RecoveryError: it does.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if found or isinstance(model, PeftModel):
        where = f" (in {len(found)} layers, the first is {found[0]})" if found else ""
        raise RecoveryError(
            f"the model already carries an adapter{where}; merge it with merge_and_unload() or take it off "
            "with "
            "unload(), then recover"
        )


def attach_lora(model: nn.Module, settings: RecoverySettings) -> PeftModel:
    """A copy of the model with LoRA on its linear layers; A is drawn from torch's random state.

    Args:
        model: left as it is, bit for bit.
        settings: rank, alpha, dropout and target are read.

    Raises:
        RecoveryError: no module matches the target.
    """
    from peft import LoraConfig, get_peft_model

    candidates = linear_modules(model)
    chosen = [name for name in candidates if _is_wanted(name, settings.target)]
    if not chosen:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        raise RecoveryError(
            f"no linear layer matches target {settings.target!r}; this model has layers named "
            f"{', '.join(endings)}"
        )
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=chosen,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(model), config)


def merge(adapted: PeftModel, original: nn.Module) -> nn.Module:
    """W + (alpha / rank) B A in every adapted layer, in place; an ordinary model comes out.

    Flags, device and configuration entries that training changes become those of ``original``.
    """
    merged: nn.Module = adapted.merge_and_unload()
    flags = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
    training = {name: module.training for name, module in original.named_modules()}
    for name, module in merged.named_modules():
        module.training = training[name]
    devices = {parameter.device for parameter in original.parameters()}
    if len(devices) == 1:
        merged.to(devices.pop())
    _restore_config(merged, original)
    return merged


def save_adapter(adapted: PeftModel, folder: str | os.PathLike[str]) -> Path:
    """Save the adapter alone as ``folder/adapter``, replacing an older one only when the new one is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "adapter"
    part = Path(tempfile.mkdtemp(dir=folder, prefix=".adapter."))
    try:
        adapted.save_pretrained(str(part))
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=folder, prefix=".adapter-old.")) / "adapter"
            os.replace(target, old)
            os.replace(part, target)
            shutil.rmtree(old.parent)
        else:
            os.replace(part, target)
        target.chmod(0o755)  # mkdtemp makes it private; a result is an ordinary folder
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def _is_wanted(name: str, target: str | tuple[str, ...]) -> bool:
    return target == "all-linear" or any(name == ending or name.endswith(f".{ending}") for ending in target)


def _restore_config(merged: nn.Module, original: nn.Module) -> None:
    """The trainer turns ``use_cache`` off while it trains; an interrupted one leaves it off."""
    wanted = getattr(getattr(original, "config", None), "use_cache", None)
    config: Any = getattr(merged, "config", None)
    if wanted is not None and config.use_cache != wanted:
        config.use_cache = wanted
