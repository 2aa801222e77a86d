"""Hidden states of a model on all calibration tokens, carried from layer to layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.importance.chain import Call, decoder_layers, first_hidden, hidden_of, record


class _Enough(Exception):
    """The module asked about was reached; the rest of the layer is not needed."""


class Stream:
    """The hidden states before one layer, of every piece of the calibration text.

    Holds ``[tokens, width]`` once, whatever the number of layers.

    Attributes:
        layers: the model's decoder layers.
        hidden: the state before layer ``at``, one tensor per piece.
        at: the layer that runs next.
    """

    def __init__(self, model: nn.Module, pieces: list[Tensor]) -> None:
        self.layers = decoder_layers(model)
        self.at = 0
        self._calls = _recorded_calls(model, pieces)
        self.hidden = [first_hidden(model, self.layers[0], piece).detach() for piece in pieces]

    def run(
        self, piece: int, watched: Iterable[str], stop: str | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the current layer on one piece.

        Args:
            piece: which.
            watched: paths of modules inside the layer.
            stop: a module before which to stop.

        Returns:
            The layer's output (the input of ``stop`` where given, None if it was not called), and the
            outputs of the watched modules that ran.
        """
        return _run(self._call(piece), self.hidden[piece], watched, stop)

    def read(
        self, piece: int, writers: Iterable[str], readers: Iterable[str]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Run the current layer on one piece: its output, what some modules returned, and what some read."""
        inputs: dict[str, Tensor] = {}

        def keep(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs[path] = args[0].clone()

            return hook

        with ExitStack() as stack:
            for path in readers:
                module = self.layers[self.at].get_submodule(path)
                stack.callback(module.register_forward_pre_hook(keep(path)).remove)
            after, written = self.run(piece, writers)
        return after, written, inputs

    def factor(self, writers: Iterable[str], written: Mapping[str, Tensor], after: Tensor) -> float | None:
        """c where the current layer is ``after = before + c · Σ written``, or None where it is not.

        Half precision may round a residual stream by more than a sublayer changes it; there a copy of the
        layer in float32 is asked.

        Args:
            writers: paths of the modules that may write into the stream.
            written: what they returned on the first piece.
            after: what the layer returned.
        """
        before = self.hidden[0]
        if before.dtype in (torch.float16, torch.bfloat16):
            before = before.float()
            after, written = _run(_in_float32(self._call(0)), before, writers)
        return added_factor(before, after, written)

    def advance(self, hidden: list[Tensor]) -> None:
        """Go on to the next layer, whose inputs these are."""
        self.hidden, self.at = hidden, self.at + 1

    def calls(self, piece: int) -> list[Call]:
        """How the model calls its layers on a piece."""
        return self._calls[piece]

    def _call(self, piece: int) -> Call:
        return self._calls[piece][self.at]


def state_before(hidden: Tensor, written: Mapping[str, Tensor], path: str, factor: float | None) -> Tensor:
    """The residual state ``[tokens, width]`` at a module: with what the writers before it added.

    It is what the module's sublayer reads where sublayers stand one behind the other; where they stand side
    by side, as in GPT-NeoX, only nearly, since neither reads the other.

    Args:
        hidden: the state before the layer.
        written: what the layer's writers returned, in the order of execution.
        path: the module; one that is no writer is taken to stand before all of them.
        factor: c of ``after = before + c · Σ written``; None where the layer is not of that form.
    """
    state = hidden.flatten(0, -2)
    if factor is None or path not in written:
        return state
    earlier = list(written)[: list(written).index(path)]
    return state + factor * sum(written[each].flatten(0, -2) for each in earlier)


def token_weights(state: Tensor) -> Tensor:
    """1 / mean square of each token's residual state ``[tokens, width]``: as the norms that read it do."""
    return 1 / state.float().square().mean(-1).clamp(min=1e-12)


def _run(
    call: Call, hidden: Tensor, watched: Iterable[str], stop: str | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """See :meth:`Stream.run`."""
    outputs: dict[str, Tensor] = {}
    reached: list[Tensor] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[path] = hidden_of(output).clone()  # some layers go on in place, on this very tensor

        return hook

    def halt(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reached.append(args[0])
        raise _Enough

    with ExitStack() as stack:
        for path in watched:
            handle = call.layer.get_submodule(path).register_forward_hook(watch(path))
            stack.callback(handle.remove)
        if stop is not None:
            stack.callback(call.layer.get_submodule(stop).register_forward_pre_hook(halt).remove)
        try:
            after = call(hidden)
        except _Enough:
            return reached[0], outputs
    return (None if stop is not None else after), outputs


def _in_float32(call: Call) -> Call:
    """The same call of a copy of the layer."""

    def wide(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(wide, value))
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    kwargs = {name: wide(value) for name, value in call.kwargs.items()}
    return Call(copy.deepcopy(call.layer).float(), wide(call.args), kwargs, call.place, call.rest)


def _recorded_calls(model: nn.Module, pieces: list[Tensor]) -> list[list[Call]]:
    """How the model calls its layers, per piece.

    Masks and positions are the same for all pieces of one shape, unless two of them show otherwise.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for number, piece in enumerate(pieces):
        by_shape.setdefault(piece.shape, []).append(number)
    found: dict[int, list[Call]] = {}
    for numbers in by_shape.values():
        first = record(model, pieces[numbers[0]]).calls
        if len(numbers) > 1:
            again = record(model, pieces[numbers[-1]]).calls
            alike = all(_same(mine, other) for mine, other in zip(first, again, strict=True))
            if not alike:
                found.update({number: record(model, pieces[number]).calls for number in numbers})
                continue
        found.update(dict.fromkeys(numbers, first))
    return [found[number] for number in range(len(pieces))]


def _same(one: Call, other: Call) -> bool:
    mine, theirs = list(one.others()), list(other.others())
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
    )


def added_factor(before: Tensor, after: Tensor, written: Mapping[str, Tensor]) -> float | None:
    """c where a layer is ``after = before + c · Σ written``, or None where it is not.

    Layers that norm what a sublayer returned, or scale the residual, are not of this form.
    """
    if not written or any(output.numel() != before.numel() for output in written.values()):
        return None  # no writers, or some that see a part of the tokens only (experts)
    parts = [output.reshape(before.shape).to(before.device).double() for output in written.values()]
    total = torch.stack(parts).sum(0)
    change = after.to(before.device).double() - before.double()
    scale = float((total * total).sum())
    if scale == 0:
        return None
    factor = float((change * total).sum()) / scale
    away = float((change - factor * total).norm())
    tolerance = 20 * torch.finfo(before.dtype).eps * float(before.double().norm() + change.norm())
    return factor if factor > 0 and away <= tolerance else None
