"""The third stage: a cut model gets its ability back through LoRA."""

from __future__ import annotations

import math
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruner_lib.recovery.adapters import attach_lora, merge, require_no_adapter, save_adapter
from pruner_lib.recovery.data import Example, TrainingData, collate, make_examples
from pruner_lib.recovery.errors import NonFiniteLossError, RecoveryError
from pruner_lib.recovery.result import RecoveryResult
from pruner_lib.recovery.settings import RecoverySettings
from pruner_lib.recovery.training import (
    LossIsNotFinite,
    OnStep,
    Progress,
    Recorder,
    own_random_state,
    quiet,
    training_arguments,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def recover(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    *,
    settings: RecoverySettings | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> RecoveryResult:
    r"""Train LoRA on a copy of the model and merge it.

    Every linear layer W but the output head becomes W + (α / r) B A, where only A and B are trained, on
    the mean next-token cross-entropy; at the end the sum is written into W. Runs on transformers'
    Trainer and PEFT. The given model is not changed, nor is any global random state.

    Args:
        model: pruned or not, without an adapter; trained on the device it is on.
        tokenizer: its own; may be None when ``data`` is token ids.
        data: a text (packed into windows of ``settings.seq_len``), token ids ``[N, L]``, or Alpaca-format
            dicts ``instruction``, ``input``, ``output``: only the response and its EOS are learnt.
        settings: the laptop's if None; ``RecoverySettings.paper()`` for the paper's.
        output_dir: the adapter alone is kept in ``adapter`` below it; nothing is kept if None.
        on_step: called after each step with ``{"step", "loss", "learning_rate"}``; training ends early if
            it returns something true.
        progress: whether to show a bar on standard error.

    Returns:
        The merged model, the history of losses, and the conditions.

    Raises:
        RecoveryError: an adapter on the model, no data, nothing to predict, tokens outside the
            vocabulary, sequences beyond the context.
        NonFiniteLossError: the loss became NaN or infinite; carries the step and the best state so far.

    Source: LLM-Pruner, arXiv 2305.11627, section 3.3; LoRA, arXiv 2106.09685.
    """
    settings = RecoverySettings() if settings is None else settings
    require_no_adapter(model)
    _require_weights(model)
    examples = make_examples(tokenizer, data, seq_len=settings.seq_len)
    _check_against(model, examples)
    with own_random_state(settings.seed), quiet():
        adapted = attach_lora(model, settings)
        trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        recorder = Recorder(trainable, on_step)
        began = time.perf_counter()
        failed_step = _train(adapted, examples, settings, recorder, _pad_token(tokenizer), progress)
        seconds = time.perf_counter() - began
    if failed_step is not None:
        recorder.restore_best()
    path = None if output_dir is None else save_adapter(adapted, output_dir)
    result = RecoveryResult(
        model=merge(adapted, model),
        history=tuple(recorder.history),
        settings=settings,
        num_examples=len(examples),
        num_tokens=recorder.num_tokens,
        num_trainable=sum(parameter.numel() for parameter in trainable.values()),
        seconds=seconds,
        adapter_path=path,
    )
    if failed_step is not None:
        raise NonFiniteLossError(_explain(failed_step, settings, result), failed_step, result)
    return result


def _train(
    adapted: PeftModel,
    examples: list[Example],
    settings: RecoverySettings,
    recorder: Recorder,
    pad_token: int,
    progress: bool,
) -> int | None:
    """Run the trainer; returns the step whose loss was not finite, or None when all went well."""
    from transformers import PrinterCallback, Trainer

    device = next(adapted.parameters()).device
    bar = Progress(recorder)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=adapted,
            args=training_arguments(settings, device, folder),
            train_dataset=_Listed(examples),
            data_collator=lambda batch: collate(batch, pad_token),
            compute_loss_func=recorder.loss,
            callbacks=[recorder, *([bar] if progress else [])],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except LossIsNotFinite:
            return len(recorder.history) + 1
        finally:
            bar.close()
    # The last step's weights have not met a loss yet.
    finite = all(bool(torch.isfinite(p).all()) for p in adapted.parameters() if p.requires_grad)
    return None if finite else len(recorder.history)


class _Listed(torch.utils.data.Dataset):
    """A list as the data set the trainer wants."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _explain(step: int, settings: RecoverySettings, result: RecoveryResult) -> str:
    finite = [loss for loss in result.losses if math.isfinite(loss)]
    kept = f"the state of lowest loss ({min(finite):.3f}) is" if finite else "the model as it was given is"
    where = "" if result.adapter_path is None else f" and its adapter in {result.adapter_path}"
    return (
        f"the loss is not finite at step {step}: training stopped; {kept} kept in this error's "
        f".result{where}. "
        f"Lower learning_rate (now {settings.learning_rate:g}) or max_grad_norm (now "
        f"{settings.max_grad_norm:g}), "
        "raise warmup_steps, or hold the weights in float32 or bfloat16"
    )


def _require_weights(model: nn.Module) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RecoveryError(
            "the model is on the meta device and has no weights to train; load it with load_model"
        )


def _check_against(model: nn.Module, examples: list[Example]) -> None:
    """Refuse tokens or lengths that this model cannot read."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    low = min(int(example.input_ids.min()) for example in examples)
    high = max(int(example.input_ids.max()) for example in examples)
    if low < 0 or (size is not None and high >= size):
        raise RecoveryError(
            f"the data holds token id {low if low < 0 else high}, outside the model's vocabulary "
            f"(0 to {(size or 0) - 1}); use the tokenizer that belongs to this model"
        )
    longest = max(len(example.input_ids) for example in examples)
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise RecoveryError(
            f"the longest sequence has {longest} tokens, beyond the model's context of {context}; lower "
            "seq_len"
        )


def _pad_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any valid id will do: padding is masked in attention and in the loss."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0
