"""The decoder's layers as a chain, so that a pass can begin or end at any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.discovery.grouping import layer_list
from pruner_lib.importance.calibration import token_losses


class NotAChain(Exception):
    """The layers do not simply hand one hidden state on; passes must run whole."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, first to last: the module list that holds most parameters."""
    path, _ = layer_list(model)
    layers = model.get_submodule(path) if path else ()
    return list(layers)  # type: ignore[arg-type]


@dataclass
class Call:
    """One recorded call of a layer, to be repeated with another hidden state.

    Attributes:
        layer: the module.
        args, kwargs: as the model called it, the hidden state among them.
        place: position or keyword of the hidden state.
        rest: what the layer returned besides the hidden state; None if it returned that alone.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    rest: tuple[Any, ...] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The layer's hidden state for another one of the same shape."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        return hidden_of(self.layer(*args, **kwargs))

    def answer(self, hidden: Tensor) -> Any:
        """A hidden state in the form in which the layer returns it."""
        return hidden if self.rest is None else (hidden, *self.rest)

    def others(self) -> Iterator[Tensor]:
        """Tensors that the call reads besides the hidden state."""
        for value in (*self.args, *self.kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, Tensor):
                    yield item


@dataclass
class Recording:
    """What the layers were given in one forward pass.

    Attributes:
        calls: one per layer.
        hidden: the hidden state before each layer, and the one after the last.
        losses: mean next-token cross-entropy per sequence ``[n]``.
        last: the hidden state after the last layer, where a pass keeps it beyond the list.
    """

    calls: list[Call] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    last: Tensor = field(default_factory=lambda: torch.empty(0))


def record(model: nn.Module, batch: Tensor) -> Recording:
    """One forward pass with every layer's call kept.

    Raises:
        NotAChain: a layer's hidden state is not the one that the layer before returned, a layer is
            called more than once, or there are no layers.
    """
    layers, found = decoder_layers(model), Recording()
    after: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = place_of_hidden(args, kwargs)
        hidden = args[place] if isinstance(place, int) else kwargs[place]
        if after and hidden is not after[-1]:
            raise NotAChain(f"layer {len(found.calls)} does not read what the layer before it returned")
        # The hidden state is kept once, in the list, so that a pass can free it there.
        kept_args = tuple(None if k == place else value for k, value in enumerate(args))
        kept = {name: None if name == place else value for name, value in kwargs.items()}
        found.calls.append(Call(module, kept_args, kept, place))
        found.hidden.append(hidden)

    def behind(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        after.append(hidden_of(output))
        found.calls[-1].rest = None if isinstance(output, Tensor) else tuple(output[1:])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(behind, with_kwargs=True) for layer in layers]
    try:
        found.losses = token_losses(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not layers or [call.layer for call in found.calls] != layers:
        raise NotAChain("the layers are not called once each, in their order")
    found.hidden.append(after[-1])
    return found


def place_of_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where a layer takes its hidden state: its first argument, or the keyword of that name."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    raise NotAChain("a layer takes no hidden state as its first argument")


def hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise NotAChain(f"a layer returns {type(output).__name__}, not a hidden state")
    return hidden


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let some modules compute something else for a while."""
    saved: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in saved.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:  # accelerate's, of a model that device_map spread
                module.__dict__["forward"] = own


@contextmanager
def starting_after(calls: list[Call], layer: int, hidden: Tensor) -> Iterator[None]:
    """Passes of the model that begin with ``hidden`` as the output of a layer.

    Everything before it is skipped. The batch may hold more rows than the recorded calls, as long as
    ``hidden`` has as many: the model makes its masks and positions itself.

    Args:
        calls: as recorded.
        layer: the layer whose output is known.
        hidden: its output ``[n, L, width]``.
    """

    def skip(call: Call) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = place_of_hidden(args, kwargs)
            return call.answer(args[place] if isinstance(place, int) else kwargs[place])

        return forward

    forwards = {call.layer: skip(call) for call in calls[:layer]}
    forwards[calls[layer].layer] = lambda *args, **kwargs: calls[layer].answer(hidden)
    with replaced(forwards):
        yield


class _Reached(Exception):
    """The first layer was called; the rest of the pass is not needed."""


def first_hidden(model: nn.Module, first: nn.Module, batch: Tensor) -> Tensor:
    """The hidden state that the first layer is given, with its graph; nothing after it is computed."""
    found: list[Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        place = place_of_hidden(args, kwargs)
        found.append(args[place] if isinstance(place, int) else kwargs[place])
        raise _Reached

    with replaced({first: stop}), suppress(_Reached):
        token_losses(model, batch)
    return found[0]
