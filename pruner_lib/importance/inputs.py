"""What each parameter reads in forward passes: second moments, means and variances of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pruner_lib.importance.parallel import Share
from pruner_lib.importance.scoring import InputUse, constant_input

# Where a function takes its weight and its input, and which dimension of the weight the input runs along.
_PRODUCTS: Mapping[Any, tuple[int, int, int]] = {
    functional.linear: (1, 0, 1),
    functional.embedding: (1, 0, 0),
    torch.addmm: (2, 1, 0),
    torch.matmul: (1, 0, 0),
    torch.mm: (1, 0, 0),
    Tensor.matmul: (1, 0, 0),
    Tensor.__matmul__: (1, 0, 0),
}
# A router in half precision multiplies by such a copy of its weight.
_CASTS = (Tensor.to, Tensor.float, Tensor.double, Tensor.type, Tensor.type_as)
# Runs of rows, each times a matrix of a stack [experts, in, out]: (rows, stack, ends of the runs).
_GROUPED = [f for f in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f]


@dataclass
class Moments:
    """Running statistics of the inputs of one use of a parameter, added up in float64.

    Attributes:
        reads: which of r, m, v are wanted.
        count: tokens seen.
        sums: sums over tokens, a vector each: ``square``, ``absolute``; for the variance ``mean`` and
            ``spread``, the sum of squared distances from it.
    """

    reads: tuple[str, ...]
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, count: int, terms: Mapping[str, Tensor]) -> None:
        """Take in the sums of ``count`` more tokens; variances merge without cancellation."""
        # A copy, also of float64: query, key and value are given the same sums, and each adds to its own.
        terms = {name: term.to("cpu", torch.float64, copy=True) for name, term in terms.items()}
        if self.count and "mean" in terms:
            step, share = terms.pop("mean") - self.sums["mean"], count / (self.count + count)
            self.sums["spread"] += terms.pop("spread") + step**2 * (self.count * share)
            self.sums["mean"] += step * share
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.count += count

    def over(self, count: int, width: int) -> Moments:
        """The same over ``count`` tokens, the missing ones with an input of zero."""
        copied = Moments(self.reads, self.count, {name: term.clone() for name, term in self.sums.items()})
        zero = torch.zeros(width, dtype=torch.float64)
        names = {"r": ("square",), "m": ("absolute",), "v": ("mean", "spread")}
        copied.add(count - self.count, {name: zero.clone() for kind in self.reads for name in names[kind]})
        return copied

    def values(self, share: Share) -> dict[str, Tensor]:
        """r, m and v as far as they are wanted, over all tokens of all ranks."""
        count = share.sum(torch.tensor(float(self.count), dtype=torch.float64))
        found = {}
        if "r" in self.reads:
            found["r"] = (share.sum(self.sums["square"].clone()) / count).sqrt()
        if "m" in self.reads:
            found["m"] = share.sum(self.sums["absolute"].clone()) / count
        if "v" in self.reads:
            mean = share.sum(self.sums["mean"] * self.count) / count
            apart = self.sums["spread"] + self.count * (self.sums["mean"] - mean) ** 2
            found["v"] = share.sum(apart) / count
        return found


def dense_terms(inputs: Tensor, reads: Iterable[str]) -> dict[str, Tensor]:
    """Sums over the tokens of dense inputs ``[…, width]``, in float32 or better."""
    rows = inputs.detach().flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    # Spelled out: vector_norm and var_mean over the first dimension take ten times as long on a CPU.
    terms: dict[str, Tensor] = {}
    if "r" in reads:
        terms["square"] = rows.square().sum(0)
    if "m" in reads:
        terms["absolute"] = rows.abs().sum(0)
    if "v" in reads:
        mean = rows.mean(0)
        terms.update(mean=mean, spread=(rows - mean).square_().sum(0))
    return terms


def token_terms(tokens: Tensor, size: int, reads: Iterable[str]) -> dict[str, Tensor]:
    """The same sums of one-hot inputs, from token ids of any shape."""
    counts = torch.bincount(tokens.detach().flatten().cpu(), minlength=size).double()
    frequency = counts / tokens.numel()
    terms: dict[str, Tensor] = {}
    if "r" in reads:
        terms["square"] = counts
    if "m" in reads:
        terms["absolute"] = counts
    if "v" in reads:
        terms.update(mean=frequency, spread=counts * (1 - frequency))
    return terms


class InputWatch(TorchFunctionMode):
    """Sees every product of an input with one of the wanted matrices, whatever module computes it.

    Args:
        matrices: the wanted parameters by name.
        reads: which of r, m, v are wanted.
    """

    def __init__(self, matrices: Mapping[str, nn.Parameter], reads: Iterable[str]) -> None:
        super().__init__()
        self.names = {id(matrix): name for name, matrix in matrices.items()}
        self.reads = tuple(reads)
        self.uses: dict[str, dict[str, Moments]] = {}
        self.experts: dict[str, dict[int, list[Moments]]] = {}
        self._last: tuple[Tensor | None, int, dict[str, Tensor]] = (None, 0, {})
        self._casts: dict[
            str, Tensor
        ] = {}  # the last copy of each matrix; held, so that its id stays its own

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        place = _PRODUCTS.get(func)
        if place is not None:
            weight, dim = args[place[0]] if len(args) > place[0] else kwargs.get("weight"), place[2]
            base = getattr(weight, "_base", None)
            if base is not None and base.ndim == 2 and base.mT.stride() == weight.stride():
                weight, dim = base, 1 - dim  # x @ W.T
            name = self.names.get(id(weight))
            with torch.no_grad():
                if name is not None:
                    self._take(name, weight, args[place[1]], dim)
                elif base is not None and base.ndim == 3 and id(base) in self.names:
                    turned = base.stride()[1:] != weight.stride()
                    expert = (weight.storage_offset() - base.storage_offset()) // base.stride(0)
                    self._take_expert(base, expert, args[place[1]], 2 - dim if turned else 1 + dim)
        elif func in _GROUPED:
            with torch.no_grad():
                ends = args[2] if len(args) > 2 else kwargs.get("offs")
                self._take_grouped(args[0], args[1], ends)
        found = func(*args, **kwargs)
        if (
            func in _CASTS
            and isinstance(found, Tensor)
            and found is not args[0]
            and id(args[0]) in self.names
        ):
            self._follow(self.names[id(args[0])], found)
        return found

    def _follow(self, name: str, cast: Tensor) -> None:
        """Know a matrix in another dtype by its name."""
        before = self._casts.pop(name, None)
        if before is not None:
            self.names.pop(id(before), None)
        self._casts[name], self.names[id(cast)] = cast, name

    def _take_grouped(self, inputs: Tensor, stack: Tensor, ends: Tensor | None) -> None:
        """Rows that are sorted by expert, with the place where each expert's rows end."""
        base = stack if id(stack) in self.names else getattr(stack, "_base", None)
        if ends is None or id(base) not in self.names:
            return
        assert base is not None
        dim = 1 if base.stride() == stack.stride() else 2
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                self._take_expert(base, expert, inputs[start:end], dim)
            start = end

    def _take_expert(self, stack: Tensor, expert: int, inputs: Tensor, dim: int) -> None:
        """What one matrix of a stack read; ``dim`` is the stack's."""
        experts = self.experts.setdefault(self.names[id(stack)], {})
        moments = experts.setdefault(dim, [Moments(self.reads) for _ in range(len(stack))])
        moments[expert].add(inputs.shape[:-1].numel(), dense_terms(inputs, self.reads))

    def _take(self, name: str, weight: Tensor, inputs: Tensor, dim: int) -> None:
        if inputs.is_floating_point():
            terms, count = self._terms(inputs), inputs.shape[:-1].numel()
        else:
            terms, count = token_terms(inputs, weight.shape[0], self.reads), inputs.numel()
        kind = f"{dim}, {'dense' if inputs.is_floating_point() else 'one-hot'}"
        self.uses.setdefault(name, {}).setdefault(kind, Moments(self.reads)).add(count, terms)

    def _terms(self, inputs: Tensor) -> dict[str, Tensor]:
        """Computed once for all matrices that read the same tensor: query, key and value; gate and up."""
        last, version, terms = self._last
        if last is not inputs or version != inputs._version:
            terms = dense_terms(inputs, self.reads)
            self._last = (inputs, inputs._version, terms)
        return terms

    def is_finite(self) -> bool:
        """False when an input that was seen held NaN or infinity."""
        seen = [moments for uses in self.uses.values() for moments in uses.values()]
        seen += [moments for dims in self.experts.values() for each in dims.values() for moments in each]
        return all(bool(torch.isfinite(total).all()) for moments in seen for total in moments.sums.values())

    def finish(
        self, parameters: Mapping[str, nn.Parameter], share: Share, tokens: int
    ) -> dict[str, list[InputUse]]:
        """What every parameter read.

        Args:
            parameters: those whose uses are wanted.
            share: this process's part of the sequences.
            tokens: how many there were on this process. An expert reads zero where a token is not its own,
                so that r, m and v of all experts are over the same tokens.

        Raises:
            ValueError: a matrix whose product was not seen on this rank.
        """
        self._last = (None, 0, {})
        seen = {*self.uses, *self.experts}
        unseen = [name for name, p in parameters.items() if p.ndim > 1 and name not in seen]
        with share.together():
            if unseen:
                raise ValueError(
                    f"the inputs of {unseen[0]} were not seen: no sequence reached it, or it is not used as "
                    "the weight of a linear, Conv1D or embedding product (experts: load the model with "
                    'experts_implementation="eager"). Score it by a criterion that reads weights or '
                    "gradients, or leave its families out (families=…)"
                )
        found: dict[str, list[InputUse]] = {}
        for name, parameter in parameters.items():
            if parameter.ndim < 2:
                found[name] = [constant_input(parameter)]
                continue
            uses = sorted(self.uses.get(name, {}).items())
            found[name] = [InputUse(int(kind[0]), moments.values(share)) for kind, moments in uses]
            for dim, experts in sorted(self.experts.get(name, {}).items()):
                each = [moments.over(tokens, parameter.shape[dim]).values(share) for moments in experts]
                values = {kind: torch.stack([one[kind] for one in each]) for kind in self.reads}
                found[name].append(InputUse(dim, values))
        return found
