"""Passes over calibration text: the loss, its gradients, and a model left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

GradientSink = Callable[[str, Tensor, float], None]


@contextmanager
def untouched(model: nn.Module, trainable: Collection[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode, gradients only for some parameters; everything put back on the way out.

    Training flags, ``requires_grad`` and the ``.grad`` tensors themselves come back as they were,
    also after an exception. Dropout is off in between, so that scores do not depend on luck.

    Args:
        model: the model to run.
        trainable: names of the parameters whose gradient is wanted.

    Yields:
        Those parameters by name.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
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
    if batches.ndim != 2 or batches.dtype.is_floating_point or batches.dtype.is_complex:
        raise ValueError(
            f"batches must be a LongTensor [samples, tokens]; got {batches.dtype} {list(batches.shape)}"
        )
    if batches.shape[0] < 1 or batches.shape[1] < 2:
        raise ValueError(
            f"batches is {list(batches.shape)}: it takes at least 1 sequence of 2 tokens, "
            "since each token is predicted from those before it"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    low, high = int(batches.min()), int(batches.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise ValueError(
            f"batches holds token id {wrong}, outside the model's vocabulary of {vocabulary} (0 to "
            f"{(vocabulary or 0) - 1}); use the tokenizer that belongs to this model"
        )
    return batches.long()


def micro_batches(batches: Tensor, size: int | None) -> list[Tensor]:
    """Rows of ``batches`` in runs of ``size``; None keeps them together.

    Raises:
        ValueError: a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, not {size}; None runs all sequences at once")
    return [batches] if size is None else list(batches.split(size))


def token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy of each sequence ``[n]``, in float32 or better.

    Args:
        model: a causal language model whose output has ``.logits``.
        batch: token ids ``[n, L]``; L - 1 tokens are predicted.
    """
    device = next(model.parameters()).device
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is not None and getattr(embedding, "weight", None) is not None:
        device = embedding.weight.device
    logits = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = batch[:, 1:].to(wide.device)
    losses = functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def backward_pass(
    model: nn.Module, pieces: list[Tensor], wanted: Mapping[str, nn.Parameter], sink: GradientSink
) -> None:
    """Run every piece forward and backward; hand each parameter's gradient over as it becomes ready.

    A piece holds n of all N sequences, its loss is their mean, and its share is n/N: the gradient of
    the mean over all N is the sum of share times gradient. The share is left to ``sink``, which can
    multiply in float32 where the gradient itself would underflow in half precision. A gradient is
    freed once ``sink`` returns.

    Args:
        model: inside :func:`untouched`.
        pieces: token ids ``[n, L]``, all of one L.
        wanted: the parameters that :func:`untouched` yielded.
        sink: called with (name, gradient, share), once per piece and parameter that the piece used.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """

    total = sum(len(piece) for piece in pieces)
    share = 1.0

    def fold(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                sink(name, gradient, share)

        return hook

    handles = [parameter.register_post_accumulate_grad_hook(fold(name)) for name, parameter in wanted.items()]
    try:
        start = 0
        for piece in pieces:
            share = len(piece) / total
            with torch.enable_grad():
                losses = token_losses(model, piece)
                _check_finite(model, piece, losses, start)
                losses.mean().backward()
            start += len(piece)
    finally:
        for handle in handles:
            handle.remove()


def mean_loss(model: nn.Module, pieces: list[Tensor]) -> float:
    """Mean cross-entropy over all sequences, without gradients.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """
    total, start = 0.0, 0
    with torch.no_grad():
        for piece in pieces:
            losses = token_losses(model, piece)
            _check_finite(model, piece, losses, start)
            total += float(losses.double().sum())
            start += len(piece)
    return total / start


def _check_finite(model: nn.Module, piece: Tensor, losses: Tensor, start: int) -> None:
    if bool(torch.isfinite(losses).all()):
        return
    row = int((~torch.isfinite(losses)).nonzero()[0])
    module = first_non_finite(model, piece[row : row + 1]) or "none: only the loss itself"
    raise FloatingPointError(
        f"the loss of calibration sequence {start + row} is {losses[row].item()}; the first module whose "
        f"output is not finite: {module}. No scores were made. Try float32 or bfloat16 weights, and look "
        "for NaN in that module's parameters"
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
