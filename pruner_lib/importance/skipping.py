"""Run a model as if some of its layers were not there, and leave it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def skipped(model: nn.Module, layers: Iterable[str] = (), sublayers: Iterable[str] = ()) -> Iterator[None]:
    """Inside, the named layers hand their input on and the named sublayers add nothing.

    Nothing is cut or copied: a hook replaces what the module returns, and goes away after.

    Args:
        model: left as it was, also after an exception.
        layers: paths of decoder layers.
        sublayers: paths of attentions or MLPs.
    """
    handles = []
    try:
        for path in layers:
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(_hand_on, with_kwargs=True))
        for path in sublayers:
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(_add_nothing, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: Any, kwargs: Any) -> torch.Tensor:
    """The hidden states among a module's inputs: the first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def first_output(output: Any) -> torch.Tensor:
    """The hidden states among a module's outputs."""
    return output[0] if isinstance(output, tuple) else output


def _hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return _in_place_of(output, first_tensor(args, kwargs))


def _add_nothing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    residual = kwargs.get("residual")
    if residual is None and "residual" in module.forward.__code__.co_varnames[: 1 + len(args)]:
        residual = args[1]
    return _in_place_of(output, torch.zeros_like(first_output(output)) if residual is None else residual)


def _in_place_of(output: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
