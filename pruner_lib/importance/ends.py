"""Gradients of the matrices at a model's two ends, made row by row and never held whole.

An embedding and an output head have a row per token of the vocabulary, and a tied one gets a gradient
of that size from both ends of the model. With U = ∂L/∂(x Wᵀ) ``[tokens, rows]`` what comes back to the
head, x ``[tokens, width]`` what it read, and u_k what comes back to the k-th token t_k that was looked up,

    ∂L/∂W[i] = Σ_k U[k, i]·x_k + Σ_{k: t_k = i} u_k

so any run of rows can be made alone. Held are U, as large as the logits and held after they are freed, so
that the peak stays where it is in any backward pass, and the small rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass
class RowGradient:
    """The gradient of one matrix, of which a run of rows is made when it is asked for.

    Attributes:
        weight: the matrix ``[rows, width]``.
        products: (U, x) of each product with it.
        lookups: (t, u) of each time its rows were looked up.
        whole: gradients that autograd made of other uses.
    """

    weight: Tensor
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)

    def any(self) -> bool:
        """Whether it can be other than zero."""
        products = any(bool(upstream.any()) and bool(inputs.any()) for upstream, inputs in self.products)
        return products or any(bool(part.any()) for part in (*(u for _, u in self.lookups), *self.whole))

    def __getitem__(self, rows: slice) -> Tensor:
        """The gradient of some rows, in float32 or, if the matrix is float64, in float64."""
        start, stop, _ = rows.indices(len(self.weight))
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        total = self.weight.new_zeros((stop - start, *self.weight.shape[1:]), dtype=wide)
        for upstream, inputs in self.products:
            total.addmm_(upstream[:, start:stop].T.to(total), inputs.to(total))
        for tokens, upstream in self.lookups:
            here = (tokens >= start) & (tokens < stop)
            total.index_add_(0, (tokens[here] - start).to(total.device), upstream[here].to(total))
        for gradient in self.whole:
            total += gradient[start:stop]
        return total


class EndGradients(TorchFunctionMode):
    """Inside, autograd makes no gradient of some matrices; what they would be made of is kept instead.

    A use that is neither a plain linear product nor a plain look-up is left to autograd; its gradient
    belongs into ``add``.

    Args:
        matrices: the matrices by name.

    Attributes:
        found: name to gradient, complete after the backward pass; without those that nothing used.
    """

    def __init__(self, matrices: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.matrices = matrices
        self.found: dict[str, RowGradient] = {}
        self._names = {id(matrix): name for name, matrix in matrices.items()}
        self._handlers: dict[Any, Callable[..., Tensor | None]] = {
            functional.linear: self._product,
            functional.embedding: self._lookup,
        }
        # What a frozen input goes into would need no gradient; reading this, it does.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = self._handlers.get(func)
        made = handler(*args, **(kwargs or {})) if handler is not None else None
        return func(*args, **(kwargs or {})) if made is None else made

    def add(self, name: str, gradient: Tensor) -> None:
        """A gradient that autograd made of another use."""
        self._of(name).whole.append(gradient)

    def _of(self, name: str) -> RowGradient:
        return self.found.setdefault(name, RowGradient(self.matrices[name].detach()))

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        name = self._names.get(id(weight))
        if name is None:
            return None
        made: Tensor = _Product.apply(inputs, weight.detach(), self._anchor, self._of(name).products)
        return made if bias is None else made + bias

    def _lookup(
        self, tokens: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **more: Any
    ) -> Tensor | None:
        name = self._names.get(id(weight))
        options = dict(zip(("max_norm", "norm_type", "scale_grad_by_freq", "sparse"), others, strict=False))
        options.update(more)
        if name is None or any(options.get(o) for o in ("max_norm", "scale_grad_by_freq", "sparse")):
            return None
        made: Tensor = _Lookup.apply(
            tokens, weight.detach(), self._anchor, self._of(name).lookups, padding_idx
        )
        return made


class _Product(Function):
    """x Wᵀ, keeping what the gradient of W is made of."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, anchor: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.kept = kept
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        ctx.kept.append((upstream.detach().flatten(0, -2), inputs.detach().flatten(0, -2)))
        return upstream @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Lookup(Function):
    """Rows of W, keeping what the gradient of W is made of; the padding token has none."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, anchor: Tensor, kept: list[Any], padding: int | None
    ) -> Tensor:
        ctx.tokens, ctx.kept = tokens, kept
        ctx.padding = None if padding is None else padding % len(weight)
        return functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        tokens, rows = ctx.tokens.flatten(), upstream.detach().flatten(0, -2)
        if ctx.padding is not None:
            tokens, rows = tokens[tokens != ctx.padding], rows[tokens != ctx.padding]
        ctx.kept.append((tokens, rows))
        return None, None, None, None, None
