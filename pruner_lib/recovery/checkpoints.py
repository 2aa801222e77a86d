"""Checkpoints of a run: whole or not there, tensors as safetensors, resumed exactly."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.recording import add_up

if TYPE_CHECKING:
    from pruner_lib.recovery.recording import Recorder

_NAME = re.compile(r"checkpoint-(\d+)")
_TENSORS, _STATE, _TRAINER = "state.safetensors", "state.json", "trainer_state.json"
_FORMAT = "pruner_lib.recovery_checkpoint"


class CannotWriteCheckpoint(Exception):
    """Raised inside the trainer to stop it; never leaves this package."""


@dataclass(frozen=True, eq=False)
class Restored:
    """A checkpoint that was found and belongs to this run.

    Attributes:
        folder: where it lies; transformers reads its own ``trainer_state.json`` there.
        document: everything in it but tensors.
        tensors: trained weights, optimizer state, best state, states of torch's generators.
    """

    folder: Path
    document: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with ``prefix/``, without it."""
        return {
            name.removeprefix(f"{prefix}/"): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }

    def load_weights(self, model: Any) -> None:
        """Put the trained weights into the model, in place."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.part("weight").items():
                parameters[name].copy_(value)

    def load_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """Put moments, step counts and the learning rate's position back."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self.part("optimizer").items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        for group, saved in zip(groups, self.document["optimizer_groups"], strict=True):
            group.update(saved)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict({**scheduler.state_dict(), **self.document["scheduler"]})

    def load_random_state(self, process: int) -> None:
        """Put the states of Python's, NumPy's and torch's generators back."""
        saved = self.document["random"][process]
        version, numbers, gauss = saved["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, position, has_gauss, cached = saved["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        tensors = self.part(f"random/{process}")
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"])


class Checkpointer(TrainerCallback):
    """Writes ``checkpoint-<step>`` every so many steps and then removes the one before."""

    def __init__(
        self,
        folder: Path,
        every: int,
        recorder: Recorder,
        parameters: Mapping[str, nn.Parameter],
        identity: Mapping[str, Any],
    ) -> None:
        self._folder, self._every, self._identity = folder, every, identity
        self._recorder, self._parameters = recorder, parameters

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write one if it is due. The last step needs none: its result is about to be returned."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        randoms, problem = _gathered(_random_state(), args.world_size), None
        if state.is_world_process_zero:
            tensors, document = self._content(kwargs["optimizer"], kwargs["lr_scheduler"])
            for process, (tensor_states, plain) in enumerate(randoms):
                tensors.update({f"random/{process}/{name}": value for name, value in tensor_states.items()})
                document["random"].append(plain)
            try:
                _write(self._folder, state, tensors, document)
            except Exception as error:  # a full disk is an error of safetensors' own, too
                problem = error
        # The other processes must stop as well, or they would wait for the first one for ever.
        if add_up(torch.tensor([float(problem is not None)])).item():
            raise CannotWriteCheckpoint(str(problem or "the first process could not")) from problem

    def _content(self, optimizer: Any, scheduler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        tensors.update({f"best/{name}": value for name, value in self._recorder.best.items()})
        saved = optimizer.state_dict()
        for number, moments in saved["state"].items():
            tensors.update({f"optimizer/{number}/{key}": torch.as_tensor(v) for key, v in moments.items()})
        groups = [
            {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
            for group in saved["param_groups"]
        ]
        kept = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
        document = {
            "format": _FORMAT, "identity": dict(self._identity), "recorder": self._recorder.state(),
            "optimizer_groups": groups, "scheduler": kept, "random": [],
        }  # fmt: skip
        return tensors, document


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def _gathered(mine: Any, processes: int) -> list[Any]:
    if processes == 1:
        return [mine]
    everyone: list[Any] = [None] * processes
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _write(folder: Path, state: Any, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write beside, bring to the disk, then take the name: a killed run leaves whole checkpoints only."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{state.global_step}"
    part = Path(tempfile.mkdtemp(dir=folder, prefix=".checkpoint-"))
    try:
        owned = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(owned, part / _TENSORS)
        (part / _STATE).write_text(json.dumps(document), encoding="utf-8")
        state.save_to_json(str(part / _TRAINER))
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for step, older in _found(folder):
        if step != state.global_step:
            shutil.rmtree(older, ignore_errors=True)


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches)


def find_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Restored | None:
    """The latest checkpoint below ``folder``, or None if there is none.

    Raises:
        RecoveryError: it is of another run (says what differs), or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = _found(folder)
    if not found:
        return None
    _, place = found[-1]
    try:
        document = json.loads((place / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(place / _TENSORS)
        json.loads((place / _TRAINER).read_text(encoding="utf-8"))
        then = document["identity"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RecoveryError(
            f"the checkpoint {place} is damaged ({error}); remove it to begin again from the start"
        ) from error
    if differing := _differences(then, json.loads(json.dumps(dict(identity)))):
        raise RecoveryError(
            f"{place} is a checkpoint of another run: {'; '.join(differing)}. Resume with what that run was "
            "given, choose another output_dir, or remove the checkpoint"
        )
    return Restored(place, document, tensors)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in dict.fromkeys((*then, *now)):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{where}{key}.")
        elif before != after:
            short = isinstance(before, str) and len(before) == 64
            lines.append(f"{where}{key} differs" if short else f"{where}{key} was {before}, is {after}")
    return lines


def model_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes, types and evenly spaced values of all parameters."""
    import hashlib

    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].double().cpu().numpy().tobytes()
        found.update(f"{name}{list(parameter.shape)}{parameter.dtype}".encode() + sample)
    return found.hexdigest()
