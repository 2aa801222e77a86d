"""Backward passes that hand each gradient on as it becomes ready, and seldom hold them all.

Σ |W·g| needs g summed over all sequences before the absolute value is taken, so with several
micro-batches something has to be held in between. Three ways, all exact:

    direct      one micro-batch: each gradient is scored and freed as the backward pass makes it, those of
                embedding and head row by row (:mod:`pruner_lib.importance.ends`)
    layers      the hidden states between the layers are held, and the backward pass goes layer by layer
                over all micro-batches: one layer's gradients at a time, for one more forward pass
    gradients   the gradients of all scored parameters are held, in float32 or better
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruner_lib.importance.calibration import check_finite, token_losses
from pruner_lib.importance.chain import (
    NotAChain,
    Recording,
    decoder_layers,
    first_hidden,
    record,
    starting_after,
)
from pruner_lib.importance.ends import EndGradients, RowGradient
from pruner_lib.importance.parallel import Share
from pruner_lib.importance.scoring import Known

ACCUMULATE = ("auto", "layers", "gradients")

GradientSink = Callable[[str, Tensor], None]


@dataclass
class Fold:
    """Adds up g and h per parameter, and scores a parameter once its sums are complete.

    Attributes:
        reads: which of g, h are wanted.
        parameters: those whose gradient is wanted, by name.
        score: called once per parameter with its name and what is known of it.
        share: this process's part of the sequences.
        weight: of the micro-batch that is running: n of all N sequences count n/N. The weight is
            multiplied in here, in float32, where a gradient in half precision would underflow.
    """

    reads: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]
    score: Callable[[str, Known], None]
    share: Share = field(default_factory=Share)
    weight: float = 1.0
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.left = set(self.parameters)

    def take_all(self, name: str, gradient: Tensor | RowGradient) -> None:
        """The gradient of the whole loss; scored at once."""
        self.left.discard(name)
        self.score(name, {"g": gradient})

    def take(self, name: str, gradient: Tensor) -> None:
        """A gradient of the loss of one micro-batch."""
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        held = self.sums.setdefault(name, {})
        for kind in ("g", "h"):
            if kind in self.reads:
                term = wide if kind == "g" else wide.square()
                if kind in held:
                    held[kind].add_(term, alpha=self.weight)
                else:
                    held[kind] = term * self.weight

    def finish(self, names: Iterable[str]) -> None:
        """Score these parameters; on several processes all must finish them in the same order."""
        for name in sorted(self.left.intersection(names)):
            self.left.discard(name)
            held = self.sums.pop(name, {})
            # A parameter that no sequence reached (an idle expert) has gradient zero.
            parameter = self.parameters[name]
            for kind in ("g", "h"):
                if kind in self.reads and kind not in held:
                    held[kind] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for kind in held:
                self.share.sum(held[kind])
            self.score(name, held)


@contextmanager
def handing_over(parameters: Mapping[str, nn.Parameter], sink: GradientSink) -> Iterator[None]:
    """Give each gradient to ``sink`` as soon as it is complete, and free it."""

    def fold(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                sink(name, gradient)

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(fold(name)) for name, parameter in parameters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Passes:
    """What the backward passes run over.

    Attributes:
        model: inside ``untouched``.
        pieces: this process's micro-batches, token ids ``[n, L]`` of one L.
        total: sequences on all processes.
        bar: moved on as passes are done.
    """

    model: nn.Module
    pieces: list[Tensor]
    total: int
    bar: tqdm

    def starts(self) -> Iterator[tuple[int, Tensor]]:
        """How many sequences came before each piece, and the piece."""
        start = 0
        for piece in self.pieces:
            yield start, piece
            start += len(piece)


def direct_pass(passes: Passes, fold: Fold) -> None:
    """The only micro-batch, forward and backward; nothing is added up.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """
    inside = set().union(*(_names(fold, layer) for layer in decoder_layers(passes.model)))
    ends = EndGradients({n: p for n, p in fold.parameters.items() if n not in inside and p.ndim == 2})

    def take(name: str, gradient: Tensor) -> None:
        if name in ends.matrices:
            ends.add(name, gradient)
        else:
            fold.take_all(name, gradient)

    (piece,) = passes.pieces
    with handing_over(fold.parameters, take), torch.enable_grad():
        with ends if ends.matrices else nullcontext():
            losses = token_losses(passes.model, piece)
        check_finite(passes.model, piece, losses, 0)
        losses.mean().backward()
    passes.bar.update()
    for name in list(ends.found):
        fold.take_all(name, ends.found.pop(name))
    fold.finish(fold.parameters)


def whole_passes(passes: Passes, fold: Fold) -> None:
    """Forward and backward through the whole model, one micro-batch after the other.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """
    with fold.share.together(), handing_over(fold.parameters, fold.take):
        for start, piece in passes.starts():
            fold.weight = len(piece) / passes.total
            with torch.enable_grad():
                losses = token_losses(passes.model, piece)
                check_finite(passes.model, piece, losses, start, fold.share)
                losses.mean().backward()
            passes.bar.update()
    fold.finish(fold.parameters)


def layered_passes(passes: Passes, fold: Fold) -> None:
    """The same sums with one layer's gradients at a time: all forward, then back layer by layer.

    A layer's parameters are complete, scored and freed once all micro-batches have gone back through
    it. Each layer runs forward twice, so this takes about 4/3 of the time of ``whole_passes``; it holds
    the hidden states ``[N, L, width]`` between all layers.

    Raises:
        NotAChain: the model's layers do not simply hand one hidden state on; nothing was done.
        FloatingPointError: a loss that is NaN or infinite; names the sequence and the module.
    """
    model, layers = passes.model, decoder_layers(passes.model)
    below = check_chain(model, passes.pieces[0][:1, :2])
    owned = [_names(fold, layer) for layer in layers]
    squared = "h" in fold.reads
    if squared and sum(map(len, owned)) > len(set().union(*owned)):
        raise NotAChain("layers share parameters, whose gradients must be added up before they are squared")
    # Tied embeddings get gradients from both ends of the model, to be added up before they are squared.
    joint = squared and below
    stop = 0 if below else min((k for k, names in enumerate(owned) if names), default=len(layers))
    recordings: list[Recording] = []
    with fold.share.together():
        for start, piece in passes.starts():
            with torch.no_grad():
                recordings.append(record(model, piece))
            check_finite(model, piece, recordings[-1].losses, start, fold.share)
            del recordings[-1].hidden[:stop]  # what no wanted gradient flows through
            passes.bar.update()
    with torch.enable_grad(), handing_over(fold.parameters, fold.take):
        upstream = [_tail(passes, fold, k, found, alone=not joint) for k, found in enumerate(recordings)]
        for layer in reversed(range(stop, len(layers))):
            for k, found in enumerate(recordings):
                hidden = found.hidden.pop().detach().requires_grad_(below or layer > stop)
                fold.weight = len(passes.pieces[k]) / passes.total
                found.calls[layer](hidden).backward(upstream[k])
                upstream[k] = hidden.grad if hidden.grad is not None else upstream[k]
            fold.finish(owned[layer].difference(*owned[:layer]))
            passes.bar.update()
        if below:
            for k, piece in enumerate(passes.pieces):
                fold.weight = len(piece) / passes.total
                ends, gradients = [first_hidden(model, layers[0], piece)], [upstream[k]]
                loss = _loss_after(passes, k, recordings[k], recordings[k].last) if joint else None
                if loss is not None and loss.requires_grad:
                    ends.append(loss)
                    gradients.append(torch.ones_like(loss))
                torch.autograd.backward(ends, gradients)
    fold.finish(fold.parameters)


def _names(fold: Fold, module: nn.Module) -> set[str]:
    """Wanted parameters that a module holds."""
    inside = {id(parameter) for parameter in module.parameters()}
    return {name for name, parameter in fold.parameters.items() if id(parameter) in inside}


def _tail(passes: Passes, fold: Fold, number: int, found: Recording, *, alone: bool) -> Tensor:
    """Back from the loss to the output of the last layer; what follows it gets its gradients if ``alone``."""
    hidden = found.hidden.pop().detach().requires_grad_(True)
    fold.weight = len(passes.pieces[number]) / passes.total
    loss = _loss_after(passes, number, found, hidden)
    if alone:
        loss.backward()
        assert hidden.grad is not None
        return hidden.grad
    found.last = hidden.detach()
    return torch.autograd.grad(loss, hidden)[0]


def _loss_after(passes: Passes, number: int, found: Recording, hidden: Tensor) -> Tensor:
    """Mean loss of a micro-batch from the output of the last layer."""
    with starting_after(found.calls, len(found.calls) - 1, hidden):
        return token_losses(passes.model, passes.pieces[number]).mean()


def check_chain(model: nn.Module, sample: Tensor) -> bool:
    """Whether gradients flow to what lies below the first layer, seen on a few tokens.

    Raises:
        NotAChain: the layers read something else that a wanted gradient flows through, or the end of
            the model reads more than the last layer's output.
    """
    with torch.enable_grad():
        found = record(model, sample)
        if any(other.requires_grad for call in found.calls for other in call.others()):
            raise NotAChain("a layer reads a computed tensor besides its hidden state")
        below = found.hidden[0]
        last = found.hidden[-1].detach().requires_grad_(True)
        begun: list[Tensor] = []
        first = found.calls[0]
        handle = first.layer.register_forward_pre_hook(
            lambda module, args, kwargs: begun.append(
                args[first.place] if isinstance(first.place, int) else kwargs[first.place]
            ),
            with_kwargs=True,
        )
        try:
            with starting_after(found.calls, len(found.calls) - 1, last):
                losses = token_losses(model, sample)
        finally:
            handle.remove()
        if begun[0].requires_grad:
            (around,) = torch.autograd.grad(losses.sum(), begun[0], allow_unused=True)
            if around is not None:
                raise NotAChain("something passes the layers by")
    return below.requires_grad


def choose(accumulate: str, passes: Passes, fold: Fold) -> str:
    """``"direct"``, ``"layers"`` or ``"gradients"``: what holds less, if the caller leaves it open."""
    if accumulate != "auto":
        return accumulate
    if fold.share.world == 1 and len(passes.pieces) == 1 and fold.reads == ("g",):
        return "direct"
    return "layers" if _hidden_bytes(passes, fold.share) < _gradient_bytes(fold) else "gradients"


def _gradient_bytes(fold: Fold) -> int:
    return sum(4 * parameter.numel() for parameter in fold.parameters.values()) * len(fold.reads)


def _hidden_bytes(passes: Passes, share: Share) -> int:
    """Of the hidden states between all layers; the same on every process."""
    embedding = getattr(passes.model, "get_input_embeddings", lambda: None)()
    width = getattr(embedding, "embedding_dim", 0)
    size = next(passes.model.parameters()).element_size()
    tokens = -(-passes.total // share.world) * passes.pieces[0].shape[1]
    return tokens * width * size * (len(decoder_layers(passes.model)) + 1)


def gradient_passes(passes: Passes, fold: Fold, accumulate: str) -> None:
    """Run the passes in the way asked for; see the module's description."""
    way = choose(accumulate, passes, fold)
    if way == "direct":
        direct_pass(passes, fold)
        return
    if way == "layers":
        try:
            layered_passes(passes, fold)
            return
        except NotAChain:
            passes.bar.reset()
    whole_passes(passes, fold)
