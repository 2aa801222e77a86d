"""The third stage: a cut model gets its ability back through LoRA, full training or a teacher."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruner_lib.recovery.adapters import attach_lora, finish, full_copy, require_no_adapter, save_adapter
from pruner_lib.recovery.checkpoints import (
    CannotWriteCheckpoint,
    Checkpointer,
    Restored,
    find_checkpoint,
    model_digest,
)
from pruner_lib.recovery.data import Example, TrainingData, make_examples
from pruner_lib.recovery.errors import CheckpointWriteError, NonFiniteLossError, RecoveryError
from pruner_lib.recovery.preparation import check_against, pad_token, prepare_examples, require_weights
from pruner_lib.recovery.recording import HeldOut, LossIsNotFinite, OnStep, Progress, Recorder
from pruner_lib.recovery.result import RecoveryResult
from pruner_lib.recovery.settings import RecoverySettings
from pruner_lib.recovery.teachers import ModelTeacher, Teacher, TeacherLogits, digest, open_teacher
from pruner_lib.recovery.training import (
    Objective,
    is_chosen_gpu,
    own_random_state,
    quiet,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    *,
    settings: RecoverySettings | None = None,
    teacher: Teacher | None = None,
    held_out: TrainingData | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> RecoveryResult:
    r"""Train a copy of the model and return it as an ordinary model.

    Every linear layer W but the output head becomes W + (α / r) B A, where only A and B are trained, on
    the mean next-token cross-entropy; at the end the sum is written into W. With
    ``settings.method="full"`` the weights themselves are trained. Runs on transformers' Trainer and
    PEFT, on one process or, under ``torchrun`` or ``accelerate launch``, on several. The given model
    is not changed, nor is any global random state.

    Args:
        model: pruned or not, without an adapter; trained on the device it is on (under ``torchrun`` a model
            on a GPU moves to the GPU of its process).
        tokenizer: its own; may be None when ``data`` is token ids.
        data: a text (packed into windows of ``settings.seq_len``), token ids ``[N, L]``, Alpaca-format
            dicts ``instruction``, ``input``, ``output`` or conversations ``messages`` (only responses are
            learnt), or rows ``text``. See ``load_text`` and ``load_instructions``.
        settings: the laptop's if None; ``RecoverySettings.paper()`` for the paper's.
        teacher: learn from its distribution, as ``settings.distillation`` says: the dense model (on any
            device), ``(model, tokenizer)`` to have the vocabularies compared as well, or what
            ``precompute_teacher`` wrote.
        held_out: text, ids or dicts whose perplexity is taken every ``settings.evaluate_every`` steps;
            the state where it was lowest is returned.
        output_dir: the adapter alone is kept in ``adapter`` below it, and checkpoints if
            ``settings.checkpoint_every`` asks for them; nothing is kept if None.
        resume: go on from the last checkpoint in ``output_dir``, where there is one. The result is bit
            for bit that of a run without interruption: one that ``settings.patience`` ended is not trained
            further. One that ``on_step`` ended is, since that function is asked anew.
        on_step: called after each step with the record of ``RecoveryResult.history``; training ends
            early if it returns something true.
        progress: whether to show a bar on standard error.

    Returns:
        The trained model, the history of losses, and the conditions.

    Raises:
        RecoveryError: an adapter on the model, no data, nothing to predict, tokens outside the
            vocabulary, sequences beyond the context, a teacher that does not fit, a checkpoint of
            another run.
        NonFiniteLossError: the loss became NaN or infinite; carries the step and the best state so far.
        CheckpointWriteError: a checkpoint could not be written; carries the state reached.

    Source: LLM-Pruner, arXiv 2305.11627, section 3.3; LoRA, arXiv 2106.09685.
    """
    run = _prepare(model, tokenizer, data, settings or RecoverySettings(), teacher, held_out, output_dir)
    restored = run.checkpoint() if resume else None
    settings = run.settings
    with own_random_state(settings.seed), quiet():
        trained = attach_lora(model, settings) if settings.method == "lora" else full_copy(model, settings)
        trainable = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        share = sum(p.numel() for p in trainable.values()) / sum(p.numel() for p in model.parameters())
        recorder = Recorder(
            trainable, held_out=run.held_out, on_step=on_step, teacher=teacher is not None, share=share
        )
        if restored is not None:
            recorder.load(restored.document["recorder"], restored.part("best"))
        began = time.perf_counter()
        problem = _train(trained, run, recorder, trainable, restored, progress)
        seconds = time.perf_counter() - began
    if problem is None or isinstance(problem, LossIsNotFinite):
        _settle(recorder, problem)
    path = None
    try:
        path = _keep_adapter(trained, run)
    except Exception as error:  # a full disk is an error of safetensors' own, too
        problem = problem or CannotWriteCheckpoint(str(error))
    result = RecoveryResult(
        adapter_path=path,
        model=finish(trained, model),
        history=tuple(recorder.history),
        settings=settings,
        num_examples=len(run.examples),
        num_tokens=recorder.num_tokens,
        num_trainable=sum(parameter.numel() for parameter in trainable.values()),
        seconds=seconds,
        held_out=tuple(recorder.held_out_history),
    )
    if problem is not None:
        raise _explain(problem, result, run)
    return result


@dataclass(frozen=True)
class _Run:
    """Everything that training needs, checked before anything is trained."""

    model: nn.Module
    settings: RecoverySettings
    examples: list[Example]
    held_out: HeldOut | None
    teacher: ModelTeacher | TeacherLogits | None
    given_teacher: Teacher | None
    pad: int
    folder: Path | None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run."""
        settings = asdict(self.settings)
        del settings["checkpoint_every"]
        return {
            "settings": settings,
            "model": model_digest(self.model),
            "data": digest(self.examples),
            "held_out": None if self.held_out is None else digest(self.held_out.examples),
            "teacher": self._teacher_digest(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }

    def _teacher_digest(self) -> str | None:
        if isinstance(self.teacher, TeacherLogits):
            return f"top {self.teacher.top_k} of {self.teacher.path.name}"
        given = self.given_teacher[0] if isinstance(self.given_teacher, tuple) else self.given_teacher
        return model_digest(given) if isinstance(given, nn.Module) else None

    def checkpoint(self) -> Restored | None:
        """The checkpoint to go on from, if there is one."""
        if self.folder is None:
            raise RecoveryError("resume=True needs output_dir, the folder where the checkpoints are")
        return find_checkpoint(self.folder, self.identity())


def _prepare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    settings: RecoverySettings,
    teacher: Teacher | None,
    held_out: TrainingData | None,
    output_dir: str | os.PathLike[str] | None,
) -> _Run:
    require_no_adapter(model)
    require_weights(model)
    settings = settings.on(next(model.parameters()).device)
    examples = prepare_examples(model, tokenizer, data, settings)
    if settings.checkpoint_every and output_dir is None:
        raise RecoveryError("checkpoint_every needs output_dir, the folder where the checkpoints go")
    watched = None
    if held_out is not None:
        rows = make_examples(tokenizer, held_out, seq_len=settings.seq_len, template=settings.template)
        check_against(model, rows)
        watched = HeldOut(
            rows, settings.evaluate_every, settings.patience, settings.micro_batch, bool(settings.bf16),
            pad_token(tokenizer),
        )  # fmt: skip
    opened = None if teacher is None else open_teacher(teacher, model, tokenizer, examples, settings)
    folder = None if output_dir is None else Path(output_dir)
    return _Run(model, settings, examples, watched, opened, teacher, pad_token(tokenizer), folder)


def _train(
    trained: nn.Module,
    run: _Run,
    recorder: Recorder,
    trainable: Mapping[str, nn.Parameter],
    restored: Restored | None,
    progress: bool,
) -> Exception | None:
    """Run the trainer; returns why it stopped before its time, or None when all went well."""
    from pruner_lib.recovery.engine import Engine

    settings = run.settings
    if restored is not None and recorder.is_out_of_patience():
        restored.load_weights(trained)  # the checkpoint was written at the step that ended the run
        return None
    device = next(trained.parameters()).device
    bar = Progress(recorder)
    callbacks: list[Any] = [recorder]
    if settings.checkpoint_every and run.folder is not None:
        callbacks.append(
            Checkpointer(run.folder, settings.checkpoint_every, recorder, trainable, run.identity())
        )
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if run.teacher is not None:
            stack.enter_context(run.teacher.ready())
        stack.callback(bar.close)
        if is_chosen_gpu(device):
            stack.enter_context(torch.cuda.device(device))  # puts back which GPU was the current one
        engine = Engine(
            trained,
            training_arguments(settings, device, settings.num_steps(len(run.examples)), scratch),
            run.examples,
            Objective(recorder, settings.distillation, run.teacher),
            pad_token=run.pad,
            callbacks=[*callbacks, *([bar] if progress else [])],
        )
        try:
            engine.run(restored)
        except (LossIsNotFinite, CannotWriteCheckpoint) as problem:
            return problem
        finally:
            if settings.gradient_checkpointing:
                trained.activation_checkpointing_disable()  # type: ignore[operator]
    # The last step's weights have not met a loss yet.
    finite = all(bool(torch.isfinite(p).all()) for p in trainable.values())
    return None if finite else LossIsNotFinite()


def _settle(recorder: Recorder, problem: Exception | None) -> None:
    """The best state is what is returned where held-out text said so, or the loss was lost."""
    if problem is not None or recorder.held_out_history:
        recorder.restore_best()


def _keep_adapter(trained: nn.Module, run: _Run) -> Path | None:
    """The adapter alone, written by the first process only."""
    if run.folder is None or run.settings.method != "lora":
        return None
    if int(os.environ.get("RANK", "0")) == 0:
        return save_adapter(trained, run.folder)  # type: ignore[arg-type]
    return run.folder / "adapter"


def _explain(problem: Exception, result: RecoveryResult, run: _Run) -> RecoveryError:
    settings, done = run.settings, len(result.history)
    where = "" if result.adapter_path is None else f" and its adapter in {result.adapter_path}"
    if isinstance(problem, CannotWriteCheckpoint):
        message = (
            f"what is kept of step {done} could not be written in {run.folder}: {problem}. Training "
            f"stopped there; its state is kept in this error's .result{where}, and an earlier "
            "checkpoint or adapter is still whole. Free some space and run again with resume=True"
        )
        return CheckpointWriteError(message, done, result)
    finite = [loss for loss in result.losses if math.isfinite(loss)]
    step = done if done == settings.num_steps(len(run.examples)) else done + 1
    kept = f"the state of lowest loss ({min(finite):.3f})" if finite else "the model as it was given"
    message = (
        f"the loss is not finite at step {step}: training stopped; {kept} is kept in this error's "
        f".result{where}. Lower learning_rate (now {settings.learning_rate:g}) or max_grad_norm (now "
        f"{settings.max_grad_norm:g}), raise warmup_steps, or hold the weights in float32 or bfloat16"
    )
    return NonFiniteLossError(message, step, result)
