"""Passes over calibration text: batches, their loss, and a model left exactly as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from pruner_lib.discovery.families import whole_number
from pruner_lib.importance.parallel import Share

_TOKENS_AT_ONCE = 2048
_NO_IDS = (torch.bool, torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def untouched(model: nn.Module, trainable: Collection[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode, gradients only for some parameters; everything put back on the way out.

    Training flags, ``requires_grad``, the ``.grad`` tensors themselves and hooks on finished gradients come
    back as they were, also after an exception. Dropout is off in between, so that scores do not depend on
    luck.

    Args:
        model: the model to run.
        trainable: names of the parameters whose gradient is wanted.

    Yields:
        Those parameters by name.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks = [(p, found) for p in model.parameters() if (found := p._post_accumulate_grad_hooks)]
    try:
        model.eval()
        for parameter, _ in hooks:  # of an optimizer that steps in the backward pass
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        wanted = {name: model.get_parameter(name) for name in trainable}
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        yield wanted
    finally:
        for parameter, requires_grad, gradient in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for parameter, found in hooks:
            parameter._post_accumulate_grad_hooks = found
        for module, training in modes:
            module.training = training


def check_batches(model: nn.Module, batches: Tensor | None) -> Tensor:
    """Token ids ``[N, L]`` that the model can read.

    Raises:
        ValueError: no batches, another shape or type, sequences too short to predict a token,
            or ids outside the vocabulary.
    """
    if not isinstance(batches, Tensor):
        raise ValueError(
            f"batches must be a LongTensor [samples, tokens] of token ids, not {type(batches).__name__}; "
            "make it with load_calibration(tokenizer, source=…, num_samples=…, seq_len=…, seed=…)"
        )
    if batches.ndim != 2 or batches.dtype in _NO_IDS or batches.dtype.is_complex:
        raise ValueError(
            f"batches must be a LongTensor [samples, tokens]; got {batches.dtype} {list(batches.shape)}"
        )
    if batches.shape[0] < 1 or batches.shape[1] < 2:
        raise ValueError(
            f"batches is {list(batches.shape)}: it takes at least 1 sequence of 2 tokens, "
            "since each token is predicted from those before it"
        )
    batches = batches.long()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    low, high = int(batches.min()), int(batches.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise ValueError(
            f"batches holds token id {wrong}, outside the model's vocabulary of {vocabulary} (0 to "
            f"{(vocabulary or 0) - 1}); use the tokenizer that belongs to this model"
        )
    return batches


def micro_batches(batches: Tensor, size: int | None) -> list[Tensor]:
    """Rows of ``batches`` in runs of ``size``; None keeps them together.

    Raises:
        ValueError: a size that is no whole number of at least 1.
    """
    if size is not None and (whole_number(size) is None or size < 1):
        wanted = "a whole number" if whole_number(size) is None else "at least 1"
        raise ValueError(
            f"micro_batch_size must be {wanted}, not {size!r}: it is how many sequences run at once; leave "
            "it out to have it chosen"
        )
    return [batches] if size is None else list(batches.split(size))


def default_size(batches: Tensor) -> int:
    """Sequences per pass when the caller names none: about 2048 tokens, which fit a laptop."""
    return max(1, _TOKENS_AT_ONCE // batches.shape[1])


def progress_bar(total: int, title: str, shown: bool | None) -> tqdm:
    """A bar with the time left, on standard error.

    Args:
        total: steps.
        title: what is going on.
        shown: None shows it in a terminal and where a run takes more than two seconds.
    """
    hidden = None if shown is None else not shown  # None: where standard error is no terminal
    return tqdm(total=total, desc=title, delay=0 if shown else 2, disable=hidden)


@contextmanager
def memory_advice(batches: Tensor, *more: str) -> Iterator[None]:
    """Turn running out of memory into advice.

    Args:
        batches: token ids ``[N, L]`` of the passes.
        more: what the caller's own arguments can do about it, beside a lower ``micro_batch_size``.

    Raises:
        MemoryError: says which knobs lower it.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        ways = ["lower micro_batch_size", "use shorter sequences", *more]
        raise MemoryError(
            f"out of memory in passes over {len(batches)} sequences of {batches.shape[1]} tokens; "
            f"{', '.join(ways[:-1])} or {ways[-1]}"
        ) from error


def accepted(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of ``forward``, and whether it takes any others (``**kwargs``).

    A PEFT model hands everything on to the one it wraps, so that one is asked.
    """
    asked: nn.Module = getattr(model, "get_base_model", lambda: model)()
    parameters = inspect.signature(asked.forward).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return {parameter.name for parameter in parameters}, open_ended


def logits_of(model: nn.Module, batch: Tensor, *, last: bool = False) -> Tensor:
    """Logits ``[n, L, vocabulary]`` of a language model, or of any module that maps token ids to them.

    Args:
        model: takes ``input_ids``, or token ids as its only argument; returns logits, or an object or
            a tuple that holds them (``.logits``, the first entry).
        batch: token ids ``[n, L]``, moved to where the embedding lies.
        last: the last token's are enough, ``[n, 1, vocabulary]``, where the model takes ``logits_to_keep``.
    """
    device = next(model.parameters()).device
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None and getattr(embedding, "weight", None) is not None:
        device = embedding.weight.device
    named, open_ended = accepted(model)
    options: dict[str, Any] = {"use_cache": False} if open_ended or "use_cache" in named else {}
    if last and "logits_to_keep" in named:
        options["logits_to_keep"] = 1
    if open_ended or "input_ids" in named:
        output = model(input_ids=batch.to(device), **options)
    else:
        output = model(batch.to(device), **options)
    found = getattr(output, "logits", output)
    return found[0] if isinstance(found, (tuple, list)) else found


def token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each sequence ``[n]``, in float32 or better.

    Args:
        model: a causal language model, see :func:`logits_of`.
        batch: token ids ``[n, L]``; L - 1 tokens are predicted.
    """
    logits = logits_of(model, batch)[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = batch[:, 1:].to(wide.device)
    losses = functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    if losses.requires_grad:
        return losses.view(targets.shape).mean(1)
    # Loss changes are differences of large numbers: the mean itself must not round them away.
    return losses.view(targets.shape).double().mean(1)


def mean_loss(model: nn.Module, pieces: list[Tensor]) -> float:
    """Mean cross-entropy over all sequences, without gradients.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """
    total, start = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            losses = token_losses(model, piece)
            check_finite(model, piece, losses, start)
            total += float(losses.double().sum())
            start += len(piece)
    return total / start


def check_finite(
    model: nn.Module, piece: Tensor, losses: Tensor, start: int, share: Share | None = None
) -> None:
    """Refuse losses that are NaN or infinite.

    Args:
        model: what computed them.
        piece: token ids ``[n, L]``.
        losses: one per sequence ``[n]``.
        start: how many sequences of this process came before.
        share: this process's part, to number the sequence as the caller does.

    Raises:
        FloatingPointError: names the sequence and the first module with such an output.
    """
    if bool(torch.isfinite(losses).all()):
        return
    row = int((~torch.isfinite(losses)).nonzero()[0])
    module = first_non_finite(model, piece[row : row + 1]) or "none: only the loss itself"
    share = share or Share()
    number = share.rank + (start + row) * share.world
    raise FloatingPointError(
        f"the loss of calibration sequence {number} is {losses[row].item()}; the first module whose "
        f"output is not finite: {module}. No scores, plan or model were made, and the given model is as it "
        "was. Try float32 or bfloat16 weights, and look for NaN in that module's parameters"
    )


def first_non_finite(model: nn.Module, batch: Tensor) -> str | None:
    """Name of the first module, in the order of execution, whose output holds NaN or infinity."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            token_losses(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
