"""What stays zero: whether an operator's result vanishes wherever its labelled operands were zeroed.

Cutting an index equals zeroing it only if nothing comes of the zeros. A matrix product with a parameter
is safe, because the parameter's own slices are zeroed too. A product or a sum of activations alone is
safe only while they are *quiet*: zero at every zeroed index. ``relu(0) = 0`` keeps that, ``exp(0) = 1``
does not, and then a sum over the index counts the zeroed ones (linear attention's ``elu(k) + 1``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .state import Info

aten = torch.ops.aten


def _packets(names: str) -> frozenset[Any]:
    both = [name for plain in names.split() for name in (plain, f"{plain}_")]
    return frozenset(getattr(aten, name) for name in both if hasattr(aten, name))


KEEPS_ZERO = _packets(
    """relu silu gelu tanh neg abs sqrt sin tan erf sign trunc round floor ceil leaky_relu elu selu celu
    mish hardswish relu6 square softshrink expm1 log1p nan_to_num native_dropout clone
    contiguous alias detach _to_copy to dropout tril triu type_as lift_fresh view _unsafe_view reshape
    _reshape_alias t transpose permute unsqueeze squeeze slice split split_with_sizes chunk select
    unbind sum mean roll flip native_layer_norm layer_norm
    view_as_complex view_as_real
    _fused_rms_norm rms_norm zero cat stack copy"""
)
LOOKUPS = _packets("index index_select gather take_along_dim embedding")
FACTORS = _packets("mul")
TERMS = _packets("add sub rsub where minimum maximum")
LERPS = _packets("lerp")
COPIES = _packets("expand repeat")
CLIPS = _packets("clamp hardtanh")
PRODUCTS = _packets("mm bmm linear addmm baddbmm")


def carries(info: Info, axis: int) -> bool:
    """True when the operand has labels at a dimension counted from the end."""
    return len(info.dims) >= -axis and isinstance(info.dims[axis], np.ndarray)


def result_is_quiet(packet: Any, args: Any, infos: Sequence[Info], dims: Sequence[Any]) -> bool:
    """Whether the result of an operator is zero at every zeroed index of its labelled dimensions.

    Args:
        packet: the operator.
        args: its positional arguments.
        infos: what is known of its tensor operands.
        dims: labels of the result.
    """
    labelled = [k - len(dims) for k, dim in enumerate(dims) if isinstance(dim, np.ndarray)]
    if not labelled:
        return True
    if packet in LOOKUPS:  # the indices looked up are positions, no values
        return infos[0].quiet
    if packet in KEEPS_ZERO:
        return all(info.quiet for info in infos)
    if packet in COPIES:  # a copy of a zeroed index is zero, but not at the fresh label of the copy
        return infos[0].quiet and sum(isinstance(d, np.ndarray) for d in infos[0].dims) == len(labelled)
    if packet in FACTORS:
        return all(any(info.quiet and carries(info, axis) for info in infos) for axis in labelled)
    if packet in TERMS:
        return len(infos) > 1 and all(
            info.quiet and carries(info, a) for info in infos[-2:] for a in labelled
        )
    if packet in LERPS:  # between the first two, whatever the weight
        return all(info.quiet and carries(info, axis) for info in infos[:2] for axis in labelled)
    if packet in (aten.div, aten.div_):
        return infos[0].quiet and all(carries(infos[0], axis) for axis in labelled)
    if packet in (aten.pow, aten.pow_):
        return infos[0].quiet and len(args) > 1 and isinstance(args[1], (int, float)) and args[1] > 0
    if packet in (aten.masked_fill, aten.masked_fill_):
        return infos[0].quiet and not isinstance(args[2], torch.Tensor) and args[2] == 0
    if packet in CLIPS:
        return infos[0].quiet and _spans_zero(*args[1:])
    if packet in PRODUCTS:
        return _product_is_quiet(packet, infos)
    return False


def _spans_zero(low: Any = None, high: Any = None) -> bool:
    numbers = all(not isinstance(bound, torch.Tensor) for bound in (low, high))
    return numbers and (low is None or low <= 0) and (high is None or high >= 0)


def _product_is_quiet(packet: Any, infos: Sequence[Info]) -> bool:
    with_bias = packet in (aten.addmm, aten.baddbmm)
    left, right = infos[1:3] if with_bias else infos[:2]
    free_left = [k for k in range(-len(left.dims), -1) if carries(left, k)]
    if packet is aten.linear:
        with_bias = len(infos) > 2
        return right.quiet and (not free_left or (left.quiet and not with_bias))
    batch = [k for k in free_left if k < -2]
    rows, columns = carries(left, -2), carries(right, -1)
    bias_reaches = not with_bias or (infos[0].quiet and not rows and not batch)
    return (
        bias_reaches
        and (left.quiet or not rows)
        and (right.quiet or not columns)
        and (left.quiet or right.quiet or not batch)
    )
