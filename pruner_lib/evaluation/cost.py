"""What a model costs: parameters, multiply-accumulates, bytes. Counted, never estimated from names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruner_lib.discovery.tracing import meta_copy
from pruner_lib.evaluation.running import EvaluationError, context_length
from pruner_lib.pruning.costs import Cost

aten = torch.ops.aten


def count_cost(model: nn.Module, *, batch_size: int = 1, seq_len: int = 64) -> Cost:
    """Count parameters, multiply-accumulates and bytes.

    A copy without weights runs once on the meta device, and each matrix product of (m × k)(k × n) adds
    m·k·n. Products of activations count like those with weights: attention's Q·Kᵀ and A·V, every
    entry of the square, since the causal half is computed and masked; and the output head at
    every position. Element-wise work (norms, activations, softmax) and table look-ups are not counted.

    ``kv_cache_bytes_per_token`` is what the cache holds after that pass / its tokens, an average. A layer
    with a sliding window keeps no more than the window, so from there on the number falls as ``seq_len``
    rises; below, it is what one more token takes.

    >>> count_cost(LlamaForCausalLM(config_of_7b)).macs  # on the meta device, in about a second
    423926693888

    Args:
        model: any causal language model, on any device, the meta device included. Not changed and not copied.
        batch_size: sequences of the counted pass.
        seq_len: tokens of each. The default 1 × 64 is that of the paper's tables.

    Raises:
        EvaluationError: a size below 1, seq_len beyond the model's context, a model that cannot run
            on the meta device.

    Source: the conditions are LLM-Pruner's (arXiv 2305.11627, table 3).
    """
    for label, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise EvaluationError(f"{label} must be at least 1, not {value}")
    longest = context_length(model)
    if longest is not None and seq_len > longest:
        raise EvaluationError(
            f"seq_len {seq_len} is beyond the model's context of {longest} tokens; lower it"
        )
    parameters = list(model.parameters())
    skeleton = meta_copy(model)
    macs, cache_bytes = _run(skeleton, batch_size, seq_len)
    return Cost(
        params=sum(parameter.numel() for parameter in parameters),
        macs=macs,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        kv_cache_bytes_per_token=None if cache_bytes is None else cache_bytes // (batch_size * seq_len),
        batch_size=batch_size,
        seq_len=seq_len,
    )


def _run(skeleton: nn.Module, batch_size: int, seq_len: int) -> tuple[int, int | None]:
    """Multiply-accumulates and cache bytes of one forward pass of a meta model."""
    failures = []
    for inputs in ways_to_call(skeleton, batch_size, seq_len):
        counter = MatrixProducts()
        try:
            with torch.no_grad(), torch.device("meta"), counter:
                output = skeleton(**inputs)
        except Exception as error:  # the model's own code fails in its own way; the next call may do
            failures.append(f"with {', '.join(inputs)}: {type(error).__name__}: {str(error)[:200]}")
            continue
        return counter.macs, _cache_bytes(getattr(output, "past_key_values", None))
    raise EvaluationError(
        f"{type(skeleton).__name__} could not be run on the meta device, so its multiply-accumulates cannot "
        f"be counted. Tried {'; '.join(failures)}. A forward that branches on values of its data "
        "cannot be counted"
    )


def ways_to_call(model: nn.Module, batch_size: int, seq_len: int) -> Iterator[dict[str, Any]]:
    """Inputs for a decoder without data-dependent branches, the most explicit first."""
    accepts = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    ids = torch.zeros((batch_size, seq_len), dtype=torch.long, device="meta")
    square = torch.zeros((batch_size, 1, seq_len, seq_len), dtype=dtype, device="meta")
    for use_cache in (True, False):
        for mask in (square, torch.ones_like(ids), None):
            way: dict[str, Any] = {"input_ids": ids}
            if mask is not None:
                way["attention_mask"] = mask
            if "position_ids" in accepts:
                way["position_ids"] = ids
            if "use_cache" in accepts or takes_any:
                way["use_cache"] = use_cache
            yield way


def _cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values in a cache; None where there are none."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else None


class MatrixProducts(TorchDispatchMode):
    """Adds up the multiply-accumulates of every matrix product that runs inside it.

    Attributes:
        macs: the sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.macs += formula(args, out)
        return out


def _product(first: int) -> Callable[[Any, Any], int]:
    """For a product A·B with A at argument ``first``: elements of A times columns of B."""

    def formula(args: Any, out: Any) -> int:
        left, right = args[first], args[first + 1]
        return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)

    return formula


def _attention(args: Any, out: Any) -> int:
    """Q·Kᵀ and A·V over all query heads: b·h·q·k·(d_qk + d_v)."""
    query, key, value = args[:3]
    rows = prod(query.shape[:-1])
    return rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _convolution(args: Any, out: Any) -> int:
    """Each output element sums over the kernel and the channels of its group."""
    signal, weight, transposed = args[0], args[1], args[6]
    elements = signal if transposed else out
    return elements.numel() * prod(weight.shape[1:])


def _grouped(args: Any, out: Any) -> int:
    """Rows sorted by expert times one matrix per expert; each row meets one matrix."""
    return args[0].numel() * args[1].shape[-1]


def _formulas() -> dict[Any, Callable[[Any, Any], int]]:
    table = {"mm": _product(0), "bmm": _product(0), "mv": _product(0), "dot": _product(0)}
    table |= {"addmm": _product(1), "baddbmm": _product(1), "addmv": _product(1)}
    table |= {"convolution": _convolution, "_grouped_mm": _grouped}
    attention = ["flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]
    attention += ["fused_attention_overrideable"]
    table |= {f"_scaled_dot_product_{name}": _attention for name in attention}
    return {getattr(aten, name): formula for name, formula in table.items() if hasattr(aten, name)}


FORMULAS = _formulas()
