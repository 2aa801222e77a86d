"""Shapes of operators' results on the meta device, remembered: layers repeat the same calls.

A meta kernel computes nothing but the shape, strides and dtype of its result from those of its operands
(and from numbers among its arguments). Many are written in Python and take ten times as long as a
look-up. A result is remembered only where that is all there is to know: the operator returns new memory
and writes to none.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Signature = tuple[Any, ...]
Result = tuple[torch.Size, tuple[int, ...], torch.dtype]


class _NotRemembered(Exception):
    """An argument says more than its signature."""


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # A number that was made a tensor promotes types in another way than a tensor of one dimension does.
        if value.device.type != "meta" or not value.dim() or value.dtype.is_complex or value.requires_grad:
            raise _NotRemembered
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item) for item in value)
    if isinstance(value, _PLAIN):
        return type(value), value
    raise _NotRemembered


class Shapes:
    """Calls operators, each distinct call once."""

    def __init__(self) -> None:
        self._known: dict[Signature, Result] = {}
        self._pure: dict[Any, bool] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``func(*args, **kwargs)`` on the meta device."""
        if not self._is_pure(func):
            return func(*args, **kwargs)
        try:
            key = (func, _signature(args), *((name, _signature(value)) for name, value in kwargs.items()))
        except _NotRemembered:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.device.type == "meta":
                self._known[key] = out.shape, out.stride(), out.dtype
            return out
        shape, stride, dtype = known
        return aten.empty_strided.default(shape, stride, dtype=dtype, device="meta")

    def _is_pure(self, func: Any) -> bool:
        """True when an operator returns one new tensor, made of tensors that it leaves alone."""
        pure = self._pure.get(func)
        if pure is None:
            schema = func._schema
            tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
            alone = all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))
            one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
            pure = self._pure[func] = tensors and alone and one
        return pure
