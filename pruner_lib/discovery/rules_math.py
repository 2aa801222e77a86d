"""Rules of the operators that compute: element by element, products, reductions, look-ups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .state import ANY, Dim, Trace

aten = torch.ops.aten


def tensors_of(values: Iterable[object]) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


def all_tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Tensors among an operator's arguments, also those inside lists."""
    values = [*args, *kwargs.values()]
    return tensors_of(t for v in values for t in (v if isinstance(v, (list, tuple)) else [v]))


def pointwise(trace: Trace, operands: Sequence[torch.Tensor], shape: Sequence[int]) -> list[Dim]:
    """Operands broadcast together: equal labels, dimension by dimension."""
    result: list[Dim] = []
    rank = len(shape)
    for k in range(rank):
        met: list[Dim] = []
        for operand in operands:
            at = k - (rank - operand.dim())
            if at >= 0 and (operand.shape[at] == shape[k]) and shape[k] != 1:
                met.append(trace.dims(operand)[at])
        result.append(trace.unify(met, "combined with") if met else None)
    return result


def rule_pointwise(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    operands = tensors_of(list(args) + list(kwargs.values()))
    shape = out.shape if isinstance(out, torch.Tensor) else out[0].shape
    dims = pointwise(trace, operands, shape)
    if func.overloadpacket in (aten.add, aten.add_) and len(operands) == 2:
        left, right = (trace.info(t) for t in operands)
        # The sum of two activations may be a residual connection; with a parameter it is a bias.
        if left.source is None and right.source is None and left.learned and right.learned and dims:
            trace.record("added", dims[-1])
    gates = (
        func.overloadpacket in (aten.mul, aten.mul_)
        and len(operands) == 2
        and all(
            trace.info(t).from_tokens and trace.info(t).source is None and t.shape == out.shape
            for t in operands
        )
    )
    if dims and (gates or func.overloadpacket in NONLINEAR):
        trace.record("bent", dims[-1])
    return dims


def rule_creation(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return [ANY if size > 1 else None for size in out.shape]


def rule_empty(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Memory to be written piece by piece: labels of its own, which each piece written equates."""
    return [trace.store.fresh(size) if size > 1 else None for size in out.shape]


def rule_counting(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return [None] * out.dim()


def _product(trace: Trace, left: torch.Tensor, right: torch.Tensor) -> list[Dim]:
    """``[…, n, k] @ […, k, m]``: contracted and batch labels agree, the others pass on."""
    a, b = trace.info(left), trace.info(right)
    contracted = trace.unify([a.dims[-1], b.dims[-2]], "contracted with") if left.shape[-1] > 1 else None
    batch = []
    for k in range(left.dim() - 2):
        batch.append(trace.unify([a.dims[k], b.dims[k]], "multiplied, head by head, with"))
    activations = a.source is None and b.source is None and a.learned and b.learned
    if not (a.quiet or b.quiet):
        trace.block(contracted, f"{LOUD} ({trace.where()})")
    if activations:
        trace.record("batched", *batch)
        trace.record("attended", contracted)
        for side in (a.dims[-2], b.dims[-1]):
            trace.record("slot" if _repeats(side) else "mixed", side)
    else:
        if a.source is not None or b.source is not None:
            trace.record("read", contracted)
            trace.record("written", a.dims[-2] if a.source else b.dims[-1])
    return [*batch, a.dims[-2], b.dims[-1]]


def _repeats(dim: Dim) -> bool:
    """True for labels merged with the sequence: what queries have besides their position."""
    return isinstance(dim, np.ndarray) and len(np.unique(dim)) < len(dim)


def rule_product(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    if func.overloadpacket in (aten.addmm, aten.baddbmm):
        dims = _product(trace, args[1], args[2])
        bias, rank = args[0], out.dim()
        for k in range(rank):
            at = k - (rank - bias.dim())
            if at >= 0 and bias.shape[at] == out.shape[k] and out.shape[k] != 1:
                dims[k] = trace.unify([dims[k], trace.dims(bias)[at]], "added to")
        return dims
    return _product(trace, args[0], args[1])


def rule_linear(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, w = trace.info(args[0]), trace.info(args[1])
    contracted = trace.unify([x.dims[-1], w.dims[1]], "contracted with")
    if not (x.quiet or w.quiet):
        trace.block(contracted, f"{LOUD} ({trace.where()})")
    trace.record("read", contracted)
    trace.record("written", w.dims[0])
    result = w.dims[0]
    if len(args) > 2 and args[2] is not None:
        result = trace.unify([result, trace.dims(args[2])[0]], "added to")
    return [*x.dims[:-1], result]


def rule_attention(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Fused attention: query ``[B, H, S, d]``, key ``[B, H, T, d]``, value ``[B, H, T, e]``."""
    query, key, value = (trace.info(t).dims for t in args[:3])
    heads = trace.unify([query[1], key[1], value[1]], "multiplied, head by head, with")
    trace.record("batched", heads)
    trace.record("attended", trace.unify([query[-1], key[-1]], "contracted with"))
    trace.record("mixed", value[-1])
    first = [query[0], heads, query[2], value[-1]]
    return [first] + [[None] * t.dim() if isinstance(t, torch.Tensor) else [] for t in out[1:]]


def _reduced(args: Any, kwargs: Any, rank: int) -> list[int]:
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(rank))
    return [k % rank for k in (given if isinstance(given, (list, tuple)) else [given])]


def _drop(dims: Sequence[Dim], gone: Sequence[int], rank: int) -> list[Dim]:
    if rank == len(dims):
        return [None if k in gone else dim for k, dim in enumerate(dims)]
    return [dim for k, dim in enumerate(dims) if k not in gone]


def rule_average(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """mean, var, norm over a labelled dimension: the result depends on how many indices there are."""
    dims = trace.dims(args[0])
    with_order = func.overloadpacket in (aten.linalg_vector_norm, aten.norm)  # the norm's order comes first
    gone = _reduced([args[0], *args[2:]] if with_order else args, kwargs, len(dims))
    for k in gone:
        trace.record("normed", dims[k], axis=k - len(dims))
    outs = out if isinstance(out, (list, tuple)) else [out]
    results = [_drop(dims, gone, t.dim()) for t in outs]
    return results if isinstance(out, (list, tuple)) else results[0]


def rule_sum(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    dims = trace.dims(args[0])
    gone = _reduced(args, kwargs, len(dims))
    if not trace.info(args[0]).quiet:
        for k in gone:
            trace.block(dims[k], f"{LOUD} ({trace.where()})")
    return _drop(dims, gone, out.dim())


def rule_compete(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """softmax, cumsum, top-k, sort, argmax: along the dimension, indices compete or have an order.

    Experts compete too, but what looks them up by the indices that top-k returned works as well with
    fewer of them: softmax and top-k only block where nothing is chosen.
    """
    packet = func.overloadpacket
    if not args[0].dim():
        return [[] for _ in out] if isinstance(out, (list, tuple)) else []
    dims = trace.dims(args[0])
    if packet in OF_SEVERAL:
        return _extremes(trace, dims, _reduced(args, kwargs, len(dims)), out)
    if packet in (aten.topk, aten.kthvalue):
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    else:
        dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
    reason = f"its indices compete or have an order ({trace.where()})"
    rivals = dims[dim]
    if isinstance(rivals, np.ndarray) and packet in CHOOSING:
        trace.rivals.append((rivals, reason))
        trace.record("competed", rivals, axis=dim % len(dims) - len(dims))
        if packet is aten.topk:
            trace.floors.append((rivals, int(args[1])))
    else:
        trace.block(rivals, reason)
    rest = list(dims)
    if packet not in CHOOSING or packet is aten.topk:
        rest[dim] = None
    outs = out if isinstance(out, (list, tuple)) else [out]
    short = [d for k, d in enumerate(rest) if k != dim % len(rest)]
    results = [rest if t.dim() == len(rest) else short for t in outs]
    return results if isinstance(out, (list, tuple)) else results[0]


def _extremes(trace: Trace, dims: Sequence[Dim], gone: Sequence[int], out: Any) -> Any:
    """Reductions to what one index holds, over one dimension, several, or all (where none is given)."""
    for k in gone:
        trace.block(dims[k], f"its indices compete or have an order ({trace.where()})")
    outs = out if isinstance(out, (list, tuple)) else [out]
    results = [_drop(dims, gone, t.dim()) for t in outs]
    return results if isinstance(out, (list, tuple)) else results[0]


def rule_layer_norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    x, shape = args[0], args[1]
    dims = list(trace.dims(x))
    for k in range(1, len(shape) + 1):
        for extra in tensors_of(args[2:4]):
            dims[-k] = trace.unify([dims[-k], trace.dims(extra)[-k]], "scaled by")
        trace.record("normed", dims[-k], axis=-k)
    outs = out if isinstance(out, (list, tuple)) else [out]
    rest = [[None] * t.dim() for t in outs[1:]]
    return [dims, *rest] if isinstance(out, (list, tuple)) else dims


def rule_embedding(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    table, ids = trace.dims(args[0]), trace.info(args[1])
    tokens = ids.from_tokens
    what = "the tokenizer gives each index its meaning" if tokens else "each index is a position in the text"
    trace.block(table[0], f"{what} ({trace.where()})")
    trace.record("token" if tokens else "place", table[0])
    trace.record("embedded", *table[1:])
    return [None] * args[1].dim() + list(table[1:])


def rule_lookup(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """index, gather, index_select …: whatever is looked up by computed index is blocked."""
    dims = trace.dims(args[0])
    if func.overloadpacket is aten.index:
        looked = [k for k, index in enumerate(args[1]) if index is not None]
        for k in looked:
            _look_up(trace, dims[k], args[1][k])
        spread = max(args[1][k].dim() for k in looked)
        rest = [dim for k, dim in enumerate(dims) if k not in looked]
        at = looked[0] if looked == list(range(looked[0], looked[0] + len(looked))) else 0
        return [*rest[:at], *([None] * spread), *rest[at:]]
    dim = args[1] % len(dims)
    _look_up(trace, dims[dim], args[2])
    return [None if k == dim else d for k, d in enumerate(dims)]


def _look_up(trace: Trace, dim: Dim, index: torch.Tensor) -> None:
    """Indices that top-k chose from a labelled dimension mean that dimension; any others are constants."""
    points = trace.info(index).points
    if isinstance(points, np.ndarray) and isinstance(dim, np.ndarray) and len(points) == len(dim):
        trace.equate(points, dim)
        trace.record("chosen", dim)
    else:
        trace.block(dim, f"looked up by an index the code computes ({trace.where()})")


def rule_scatter(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """index_add, index_put, scatter …: rows chosen by computed index; other dimensions agree."""
    dims = list(trace.dims(args[0]))
    if func.overloadpacket in (aten.index_put, aten.index_put_):
        count = len(args[1])
        values = args[2]
        for k in range(len(dims)):
            at = values.dim() - (len(dims) - k)
            if k < count:
                trace.block(dims[k], f"written by an index the code computes ({trace.where()})")
                dims[k] = None
            elif at >= 0 and values.shape[at] == args[0].shape[k] and args[0].shape[k] > 1:
                dims[k] = trace.unify([dims[k], trace.dims(values)[at]], "written with")
        return dims
    dim = args[1] % len(dims)
    source = next((t for t in reversed(args) if isinstance(t, torch.Tensor)), None)
    points = trace.info(args[2]).points if isinstance(args[2], torch.Tensor) else None
    for k in range(len(dims)):
        if k == dim and isinstance(points, np.ndarray) and len(points) == args[0].shape[k]:
            dims[k] = trace.unify([d for d in (dims[k], points) if isinstance(d, np.ndarray)], "written at")
            trace.record("chosen", points)
        elif k == dim:
            trace.block(dims[k], f"written by an index the code computes ({trace.where()})")
            dims[k] = None
        elif source is not None and source.dim() == len(dims) and source.shape[k] == args[0].shape[k] > 1:
            dims[k] = trace.unify([dims[k], trace.dims(source)[k]], "written with")
    return dims


def rule_same(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return list(trace.dims(args[0]))


def rule_copy(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return pointwise(trace, [args[0], args[1]], out.shape)


def rule_unknown(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Unknown never means unconnected: every label that goes in is blocked, none comes out."""
    touched = False
    for tensor in all_tensors(args, kwargs):
        for dim in trace.dims(tensor):
            if isinstance(dim, np.ndarray):
                touched = True
                trace.block(dim, f"no rule for the operator {trace.where()}")
    if touched:
        trace.without_rule.setdefault(trace.operator, set()).add(trace.module)


def _all(names: str, rule: Callable) -> dict[Any, Callable]:
    return {getattr(aten, name): rule for name in names.split() if hasattr(aten, name)}


NONLINEAR = {
    getattr(aten, name)
    for plain in [
        "relu",
        "silu",
        "gelu",
        "tanh",
        "sigmoid",
        "erf",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "mish",
        "hardswish",
        "hardtanh",
        "hardsigmoid",
        "relu6",
        "softplus",
        "log_sigmoid_forward",
        "log_sigmoid",
        "square",
        "abs",
        "clamp",
        "clamp_min",
    ]
    for name in (plain, f"{plain}_")
    if hasattr(aten, name)
}
LOUD = "summed over after an operation that turns its zeros into something else"
OF_SEVERAL = {
    *(aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.argmax, aten.argmin),
    *(aten.prod, aten.logsumexp, aten.any, aten.all),
}
CHOOSING = {aten._softmax, aten._safe_softmax, aten._log_softmax, aten.softmax, aten.topk}
POINTWISE = """add sub rsub mul div neg abs exp exp2 expm1 log log1p log2 sqrt rsqrt pow reciprocal sigmoid
    tanh relu silu gelu leaky_relu elu softplus mish hardtanh hardswish hardsigmoid relu6 clamp clamp_min
    clamp_max minimum maximum where masked_fill sin cos tan erf floor ceil round trunc sign fmod remainder
    floor_divide
    bitwise_and bitwise_or bitwise_not bitwise_xor logical_and logical_or logical_not logical_xor eq ne lt le
    gt ge isnan isinf addcmul addcdiv lerp threshold atan2 square nan_to_num log_sigmoid_forward
    native_dropout softshrink selu celu log_sigmoid polar complex"""
SAME = """clone contiguous alias detach _to_copy to lift_fresh lift_fresh_copy dropout tril triu _conj
    view_as_real_copy type_as"""

RULES = {
    **_all(POINTWISE, rule_pointwise),
    **_all(" ".join(f"{name}_" for name in POINTWISE.split()), rule_pointwise),
    **_all(SAME, rule_same),
    **_all(
        "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor",
        rule_creation,
    ),
    **_all("empty empty_like new_empty empty_strided new_empty_strided", rule_empty),
    **_all("zero_ fill_", rule_same),
    **_all(
        "arange linspace rand randn rand_like randn_like randint one_hot eye bucketize searchsorted "
        "tril_indices triu_indices",
        rule_counting,
    ),
    **_all("mm bmm addmm baddbmm", rule_product),
    **_all("linear", rule_linear),
    **_all(
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention",
        rule_attention,
    ),
    **_all("mean var std var_mean std_mean linalg_vector_norm norm", rule_average),
    **_all("sum", rule_sum),
    **_all(
        "_softmax _safe_softmax _log_softmax softmax cumsum cumprod topk sort argsort argmax argmin kthvalue "
        "amax amin aminmax max min prod logsumexp any all",
        rule_compete,
    ),
    **_all("native_layer_norm layer_norm _fused_rms_norm rms_norm", rule_layer_norm),
    **_all("embedding", rule_embedding),
    **_all("index gather index_select take_along_dim", rule_lookup),
    **_all(
        "index_put index_put_ index_add index_add_ scatter scatter_ scatter_add scatter_add_ index_copy "
        "index_copy_ scatter_reduce index_fill index_fill_",
        rule_scatter,
    ),
    **_all("copy_ copy", rule_copy),
}
