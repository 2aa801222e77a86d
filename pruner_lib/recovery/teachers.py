"""Where a teacher's distribution comes from: the dense model itself, or its likeliest tokens on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruner_lib.assets.files import whole_file
from pruner_lib.importance.calibration import untouched
from pruner_lib.recovery.data import Example, TrainingData, collate
from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.losses import DenseTargets, SoftTargets, TopTargets
from pruner_lib.recovery.settings import RecoverySettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]
_FORMAT = "pruner_lib.teacher_logits"


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about one batch.

    Attributes:
        soft: its distribution at flat positions of the batch.
        hidden_states: the residual stream after each layer, ``[B, L, D]`` each; empty if not asked for.
    """

    soft: SoftTargets
    hidden_states: tuple[Tensor, ...] = ()


class ModelTeacher:
    """A model in memory, on any device, run on every batch without gradients."""

    def __init__(self, model: nn.Module, temperature: float, *, hidden: bool, bf16: bool) -> None:
        self._model, self._temperature, self._hidden, self._bf16 = model, temperature, hidden, bf16
        self._device = next(model.parameters()).device

    @contextmanager
    def ready(self) -> Iterator[ModelTeacher]:
        """Evaluation mode and no gradients inside; the model as it was after."""
        with untouched(self._model):
            yield self

    def lesson(self, batch: Batch, rows: Sequence[int]) -> Lesson:
        """Run the teacher on a batch."""
        inputs = {name: value.to(self._device) for name, value in batch.items()}
        cast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
        with torch.no_grad(), cast:
            outputs = self._model(**inputs, use_cache=False, output_hidden_states=self._hidden)
        logits = outputs.logits.flatten(0, 1)

        def soft(index: Tensor) -> DenseTargets:
            chosen = logits[index.to(logits.device)].to(index.device)
            wide = chosen if chosen.dtype == torch.float64 else chosen.float()
            return DenseTargets(wide / self._temperature)

        return Lesson(soft, tuple(outputs.hidden_states[1:]) if self._hidden else ())


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's k likeliest tokens for every token of a set of examples, in one file.

    Read from the disk batch by batch. Made by :func:`precompute_teacher`.

    Attributes:
        path: the safetensors file.
        temperature: the probabilities are of softmax(logits / temperature).
        top_k: tokens kept at each place.
        vocabulary: size of the teacher's vocabulary.
        examples_digest: of the examples it was made for.
    """

    path: Path
    temperature: float
    top_k: int
    vocabulary: int
    examples_digest: str
    _file: Any = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TeacherLogits:
        """Open a file that :func:`precompute_teacher` wrote.

        Raises:
            RecoveryError: no such file, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
            notes = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise RecoveryError(f"cannot read the teacher's logits in {path}: {error}") from error
        if notes.get("format") != _FORMAT:
            raise RecoveryError(f"{path} holds no teacher's logits; make them with precompute_teacher")
        return cls(
            Path(path), float(notes["temperature"]), int(notes["top_k"]), int(notes["vocabulary"]),
            notes["examples"], file,
        )  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[TeacherLogits]:
        """Nothing to prepare."""
        yield self

    def lesson(self, batch: Batch, rows: Sequence[int]) -> Lesson:
        """Look the rows of the examples up; padding keeps an even distribution that nobody reads."""
        shape = (*batch["input_ids"].shape, self.top_k)
        ids = torch.zeros(shape, dtype=torch.long)
        log_probs = torch.full(shape, -30.0)
        for place, row in enumerate(rows):
            start, stop = self._file.get_slice("bounds")[row : row + 2].tolist()
            ids[place, : stop - start] = self._file.get_slice("ids")[start:stop].long()
            log_probs[place, : stop - start] = self._file.get_slice("log_probs")[start:stop].float()
        flat_ids, flat_log_probs = ids.flatten(0, 1), log_probs.flatten(0, 1)

        def soft(index: Tensor) -> TopTargets:
            where = index.cpu()
            return TopTargets(flat_ids[where].to(index.device), flat_log_probs[where].to(index.device))

        return Lesson(soft)


Teacher = nn.Module | tuple[nn.Module, Any] | TeacherLogits | str | os.PathLike[str]


def precompute_teacher(
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    path: str | os.PathLike[str],
    *,
    settings: RecoverySettings | None = None,
    top_k: int = 64,
) -> TeacherLogits:
    """Run the teacher once over the data and keep its k likeliest tokens at each place.

    So the teacher need not be in memory while the student learns, and later epochs and runs cost no
    further pass. A token takes 8·k bytes: 32-bit log-probabilities and ids.

    Args:
        teacher: the dense model; left as it is.
        tokenizer: as for ``recover``.
        data: as for ``recover``, and the same data must be given there.
        path: the file to write, whole or not at all.
        settings: those of the later ``recover``: window, template, packing, temperature, bf16 are read.
        top_k: k; of the vocabulary's size the divergence is whole.

    Returns:
        The opened file; give it, or its path, as ``teacher=``.

    Raises:
        RecoveryError: unusable data, or top_k outside the vocabulary.
        OSError: the file could not be written; an older one is still whole.
    """
    from safetensors.torch import save_file

    from pruner_lib.recovery.preparation import pad_token, prepare_examples

    settings = (settings or RecoverySettings()).on(next(teacher.parameters()).device)
    examples = prepare_examples(teacher, tokenizer, data, settings)
    source = ModelTeacher(teacher, settings.distillation.temperature, hidden=False, bf16=bool(settings.bf16))
    vocabulary = output_size(teacher)
    if not 1 <= top_k <= vocabulary:
        raise RecoveryError(f"top_k must be from 1 to the vocabulary's {vocabulary}, got {top_k}")
    pieces: list[tuple[Tensor, Tensor]] = []
    with source.ready():
        for start in range(0, len(examples), settings.micro_batch):
            part = examples[start : start + settings.micro_batch]
            pieces += _likeliest(source, part, pad_token(tokenizer), top_k)
    bounds = torch.tensor([0, *(len(e) for e in examples)]).cumsum(0)
    tensors = {
        "bounds": bounds,
        "ids": torch.cat([ids for ids, _ in pieces]),
        "log_probs": torch.cat([log_probs for _, log_probs in pieces]),
    }
    notes = {
        "format": _FORMAT, "temperature": repr(float(settings.distillation.temperature)), "top_k": str(top_k),
        "vocabulary": str(vocabulary), "examples": digest(examples),
    }  # fmt: skip
    with whole_file(Path(path)) as temporary:
        save_file(tensors, temporary, notes)
    return TeacherLogits.open(Path(path))


def _likeliest(
    source: ModelTeacher, part: Sequence[Example], pad: int, top_k: int
) -> list[tuple[Tensor, Tensor]]:
    """Per example its token ids ``[L, k]`` and log-probabilities ``[L, k]``."""
    batch = collate(part, pad)
    del batch["labels"]
    soft = source.lesson(batch, range(len(part))).soft
    longest = batch["input_ids"].shape[1]
    kept = []
    for row, example in enumerate(part):
        targets = soft(torch.arange(row * longest, row * longest + len(example)))
        assert isinstance(targets, DenseTargets)
        values, ids = torch.log_softmax(targets.logits, dim=-1).topk(top_k)
        kept.append((ids.to(torch.int32).cpu(), values.float().cpu()))
    return kept


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of all token ids, labels and positions."""
    found = hashlib.sha256()
    for example in examples:
        for part in (example.input_ids, example.labels, example.positions):
            if part is not None:
                found.update(part.numpy().tobytes())
            found.update(b"|")
    return found.hexdigest()


def output_size(model: nn.Module) -> int:
    """Numbers in the model's logits, as its output head or, without one, its embedding has them."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is None:
        weight = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    if weight is None:
        raise RecoveryError(
            f"{type(model).__name__} has neither output head nor embedding to tell its vocabulary by"
        )
    return int(weight.shape[0])


def open_teacher(
    teacher: Teacher,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Example],
    settings: RecoverySettings,
) -> ModelTeacher | TeacherLogits:
    """The teacher in the form that training uses, checked against student, data and settings.

    Raises:
        RecoveryError: another vocabulary, other data, another temperature, hidden states that cannot
            be compared.
    """
    hidden = settings.distillation.hidden_weight > 0
    if isinstance(teacher, (str, os.PathLike)):
        teacher = TeacherLogits.open(teacher)
    if isinstance(teacher, TeacherLogits):
        _check_size(teacher.vocabulary, output_size(student))
        _check_file(teacher, examples, settings, hidden)
        return teacher
    model, other = teacher if isinstance(teacher, tuple) else (teacher, None)
    if not isinstance(model, nn.Module) or any(p.is_meta for p in model.parameters()):
        raise RecoveryError(
            "teacher must be a model with weights, (model, tokenizer), or what precompute_teacher wrote; got "
            f"{'a model on the meta device' if isinstance(model, nn.Module) else type(model).__name__}"
        )
    _check_size(output_size(model), output_size(student))
    if other is not None and tokenizer is not None and other.get_vocab() != tokenizer.get_vocab():
        raise RecoveryError(
            "the teacher's tokenizer has another vocabulary than the student's, of the same size or not: its "
            "distribution would be read as one over other tokens; take as teacher the model that was pruned"
        )
    if hidden:
        _check_hidden(model, student)
    return ModelTeacher(model, settings.distillation.temperature, hidden=hidden, bf16=bool(settings.bf16))


def _check_size(teacher: int, student: int) -> None:
    if teacher != student:
        raise RecoveryError(
            f"the teacher has another vocabulary: {teacher} tokens against the student's {student}; take as "
            "teacher the model that was pruned"
        )


def _check_file(
    teacher: TeacherLogits, examples: Sequence[Example], settings: RecoverySettings, hidden: bool
) -> None:
    if hidden:
        raise RecoveryError(
            "precomputed logits hold no hidden states; set hidden_weight to 0 or give the model as teacher"
        )
    if teacher.examples_digest != digest(examples):
        raise RecoveryError(
            f"{teacher.path} was made for other examples; give the data, tokenizer, seq_len, template and "
            "packing that precompute_teacher was given, or make it again"
        )
    if teacher.temperature != settings.distillation.temperature:
        raise RecoveryError(
            f"{teacher.path} was made at temperature {teacher.temperature:g}, the settings ask for "
            f"{settings.distillation.temperature:g}; make it again or change the setting"
        )


def _check_hidden(teacher: nn.Module, student: nn.Module) -> None:
    widths = [getattr(getattr(m, "config", None), "hidden_size", None) for m in (teacher, student)]
    if widths[0] is None or widths[0] != widths[1]:
        raise RecoveryError(
            f"hidden states of width {widths[0]} (teacher) and {widths[1]} (student) cannot be compared; set "
            "hidden_weight to 0 where the residual width was pruned"
        )
