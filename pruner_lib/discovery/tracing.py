"""One symbolic run of a model on the meta device, with labels flowing through every operator."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import quietness, rules_math, rules_shape
from .memo import Shapes
from .state import Dim, Info, Trace

RULES: dict[Any, Callable] = {**rules_math.RULES, **rules_shape.RULES}
aten = torch.ops.aten
PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32}
FLOAT8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}
NUMERIC = {getattr(aten, name + end) for name in ("add", "sub", "mul", "div", "pow") for end in ("", "_")}
LOOKUPS = (aten.index, aten.index_select)
FILLS = {aten.full: 1, aten.full_like: 1, aten.new_full: 2}  # and where the number stands
SEQUENCE = 5  # tokens of the symbolic run; small, and rarely the size of anything else
VIEWS = set(rules_shape.RULES) | {k for k, rule in rules_math.RULES.items() if rule is rules_math.rule_same}


class DiscoveryError(RuntimeError):
    """The model could not be run symbolically; the message says what to do."""


def refuse_quantised(model: nn.Module) -> None:
    """Raise where weights are packed whole numbers or eight-bit floats, whose scales lie elsewhere.

    torch's own quantisation keeps a tuple ``(weight, bias)`` in the state dict.
    """
    for name, kept in model.state_dict(keep_vars=True).items():
        for tensor in kept if isinstance(kept, tuple) else (kept,):
            if isinstance(tensor, torch.Tensor) and _is_quantised(tensor):
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise DiscoveryError(
                    f"{name} is stored as {dtype}: this model is quantised. "
                    "Load the model unquantised (dtype='bfloat16' for example), prune it, quantise the result"
                )


def _is_quantised(tensor: torch.Tensor) -> bool:
    """A matrix whose rows and columns are not plain numbers; uint8 buffers are masks."""
    if tensor.is_quantized:
        return True
    packed = tensor.dtype in PACKED and (isinstance(tensor, nn.Parameter) or tensor.dtype is not torch.uint8)
    return tensor.dim() > 1 and (packed or tensor.dtype in FLOAT8)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without weights: every tensor on the meta device, ties kept.

    The given model is not touched and its weights are not copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for module in model.modules():
        own = [*module._buffers.values(), *(v for v in vars(module).values() if isinstance(v, torch.Tensor))]
        for tensor in own:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(module, hooks).clear()
        if "_old_forward" in vars(module):  # accelerate's, which moves inputs and weights between devices
            vars(module)["forward"] = vars(module).pop("_old_forward")
            vars(module).pop("_hf_hook", None)
    for module in copied.modules():  # layers of different widths hold configurations of their own
        config = vars(module).get("config")
        if getattr(config, "_experts_implementation_internal", None) is not None:
            # The one way through the experts that asks for no values.
            vars(config)["_experts_implementation_internal"] = "batched_mm"
        if getattr(config, "_attn_implementation_internal", None) == "flex_attention":
            vars(config)["_attn_implementation_internal"] = "sdpa"  # which needs no compiled mask
    return copied.eval()


class LabelMode(TorchDispatchMode):
    """Sees every ATen operator and applies its rule to the labels.

    Args:
        trace: what is known so far.
        remember: take the shapes of repeated calls from memory; modes around this one do not see those calls.
    """

    def __init__(self, trace: Trace, remember: bool = True) -> None:
        super().__init__()
        self.trace = trace
        self.shapes = Shapes() if remember else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs) if self.shapes is None else self.shapes.call(func, args, kwargs)
        outs = out if isinstance(out, (list, tuple)) else [out]
        if not any(isinstance(t, torch.Tensor) for t in outs):
            return out
        trace = self.trace
        packet = func.overloadpacket
        trace.operator = packet.__name__
        inputs = rules_math.all_tensors(args, kwargs)
        rule = RULES.get(packet)
        if rule is None:
            rules_math.rule_unknown(trace, func, args, kwargs, out)
            dims: list[list[Dim]] = [[None] * t.dim() if isinstance(t, torch.Tensor) else [] for t in outs]
        else:
            found = rule(trace, func, args, kwargs, out)
            dims = found if isinstance(out, (list, tuple)) else [found]
        infos = [trace.info(t) for t in inputs]
        for info in infos:
            if info.source is not None:
                trace.used.setdefault(info.source, len(trace.used))
        _note_factors(trace, packet, args, kwargs, infos)
        written = outs[0] if args and outs[0] is args[0] else None
        for tensor, labels in zip(outs, dims, strict=False):
            if isinstance(tensor, torch.Tensor):
                labels = _fitting(labels, tensor.shape, trace)
                trace.set(tensor, _info(packet, args, infos, labels))
        if packet is aten.topk:
            trace.info(outs[1]).points = _chosen_from(trace, args, kwargs)
        if written is not None:
            _write_through(trace, written)
        return out


def _fitting(labels: list[Dim], shape: torch.Size, trace: Trace) -> list[Dim]:
    """The labels that a rule gave, none for dimensions of one index; a rule that miscounts must not go on."""
    sizes = [
        len(dim) if isinstance(dim, np.ndarray) else size for dim, size in zip(labels, shape, strict=False)
    ]
    if len(labels) != len(shape) or sizes != list(shape):
        raise RuntimeError(f"the rule for {trace.where()} labels {sizes}, the result is {list(shape)}")
    return [None if size == 1 else dim for dim, size in zip(labels, shape, strict=True)]


def _info(packet: Any, args: Any, infos: list[Info], labels: list[Dim]) -> Info:
    """What is known of a result: its labels, and what follows from the operands."""
    seen = packet in VIEWS
    first = infos[0] if infos else Info([])
    # The rows of a weight that chosen experts look up are still a weight.
    chosen = packet in LOOKUPS and any(isinstance(info.points, np.ndarray) for info in infos[1:])
    return Info(
        labels,
        source=first.source if seen or chosen else None,
        from_tokens=any(info.from_tokens for info in infos),
        learned=any(info.learned for info in infos),
        quiet=quietness.result_is_quiet(packet, args, infos, labels),
        points=first.points if seen else None,
    )


def _chosen_from(trace: Trace, args: Any, kwargs: Any) -> Dim:
    return trace.dims(args[0])[args[2] if len(args) > 2 else kwargs.get("dim", -1)]


def _note_factors(trace: Trace, packet: Any, args: Any, kwargs: Any, infos: list[Info]) -> None:
    """Numbers that the code multiplies or adds to something learned; a cut must not change them.

    One that fills a tensor counts, whatever the tensor is for, and so do the weights of a sum (``alpha``).
    """
    found: list[Any] = []
    if packet in FILLS:
        found += [args[FILLS[packet]] if len(args) > FILLS[packet] else kwargs.get("fill_value")]
    elif any(info.learned for info in infos):
        found += [kwargs[name] for name in ("alpha", "beta") if name in kwargs]
        found += args[1:] if packet in NUMERIC else ()
    for value in found:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            trace.factors.append((trace.module, trace.operator, float(value)))


def _write_through(trace: Trace, view: torch.Tensor) -> None:
    """An operator wrote into a view: what is known of the whole tensor follows."""
    base = view._base
    if base is None or id(base) not in trace.infos:
        return
    whole, part = trace.info(base), trace.info(view)
    whole.learned |= part.learned
    whole.from_tokens |= part.from_tokens
    whole.quiet &= part.quiet
    if not any(isinstance(dim, np.ndarray) for dim in whole.dims):
        for dim in part.dims:
            trace.block(dim, f"written into a part of a constant tensor ({trace.where()})")


def label_parameters(trace: Trace, model: nn.Module) -> dict[str, list[Dim]]:
    """Fresh labels for every dimension of every parameter and buffer; tied ones share them."""
    labels: dict[str, list[Dim]] = {}
    parameters = set()
    for name, parameter in model.named_parameters():
        parameters.add(name)
        labels[name] = _label(trace, name, parameter, learned=True)
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        labels[name] = _label(trace, name, buffer, learned=False)
        if buffer.dtype is torch.bool and name not in kept:  # a mask over positions, never cut
            labels[name] = [None] * buffer.dim()
            trace.set(buffer, Info(list(labels[name]), source=name))
    for name, dims in labels.items():
        if name not in parameters and name not in kept:
            for dim in dims:
                trace.block(dim, f"tied to the table {name}, which the code computes from the configuration")
    return labels


def _label(trace: Trace, name: str, tensor: torch.Tensor, *, learned: bool) -> list[Dim]:
    dims: list[Dim] = [trace.store.fresh(size) if size > 1 else None for size in tensor.shape]
    trace.set(tensor, Info(dims, source=name, learned=learned))
    return dims


class Spelling(TorchFunctionMode):
    """Sees what the code wrote before torch turns it into operators.

    ``x[..., [-2], :]`` reaches the operators as an index tensor of unknown values; written as a slice it
    means the same. Attention without ``scale`` computes it from the number of channels.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            return func(args[0], tuple(map(_as_slice, args[1])) if _is_lone(args[1]) else args[1])
        if func is torch.tensor and args and type(args[0]) in (int, float):
            self.trace.factors.append((self.trace.module, "tensor", float(args[0])))
        if func is torch.nn.functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            reason = "the softmax scale is computed from their number (scaled_dot_product_attention)"
            self.trace.block(self.trace.dims(query)[-1], reason)
        return func(*args, **kwargs)


def _is_lone(index: tuple[Any, ...]) -> bool:
    """True for an index of slices and one list of one number, which keeps its place."""
    lists = [i for i in index if isinstance(i, list)]
    plain = all(i is None or i is Ellipsis or isinstance(i, (slice, list)) for i in index)
    return plain and len(lists) == 1 and len(lists[0]) == 1 and isinstance(lists[0][0], int)


def _as_slice(index: Any) -> Any:
    if not isinstance(index, list):
        return index
    return slice(index[0], index[0] + 1 or None)


@contextmanager
def module_paths(trace: Trace, model: nn.Module) -> Iterator[None]:
    """Keep ``trace.module`` at the path of the innermost module that is running."""
    handles = []
    stack: list[str] = []

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(trace.module)
            trace.module = name

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        trace.module = stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        trace.module = ""


def default_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Ways to call a decoder without data-dependent branches, most explicit first."""
    accepts = inspect.signature(model.forward).parameters
    key = "input_ids" if "input_ids" in accepts else next(iter(accepts), "input_ids")
    given = {key: _meta(torch.long, 1, SEQUENCE)}
    if "attention_mask" in accepts:
        given["attention_mask"] = _meta(torch.long, 1, SEQUENCE)
    return _spelled_out(model, given)


def given_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The caller's inputs as they are, then with what transformers would work out from their values."""
    given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return [given, *_spelled_out(model, given)]


def _spelled_out(model: nn.Module, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs with positions and mask written out, which leaves nothing to be read off values.

    What is coupled depends on neither. A mask of ones and zeros is replaced, any other is kept.
    """
    accepts = inspect.signature(model.forward).parameters
    first = next((v for v in given.values() if isinstance(v, torch.Tensor) and v.dim() > 1), None)
    if first is None:
        return [dict(given)]
    length = first.shape[1]
    extra = {"use_cache": False, "position_ids": _meta(torch.long, 1, length)}
    full = {**{k: v for k, v in extra.items() if k in accepts}, **given}
    mask = full.get("attention_mask")
    if "attention_mask" not in accepts or (isinstance(mask, torch.Tensor) and mask.dim() > 2):
        return [full]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    without = {k: v for k, v in full.items() if k != "attention_mask"}
    square = {**full, "attention_mask": _meta(dtype, 1, 1, length, length)}
    return [square, without] if mask is None else [square, full, without]


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def run(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    *,
    log: bool = False,
    remember: bool = True,
) -> tuple[Trace, dict[str, list[Dim]]]:
    """Run a meta model symbolically.

    Args:
        model: on the meta device.
        example_inputs: see ``discover``.
        log: keep the equations.
        remember: see :class:`LabelMode`.

    Returns:
        ``(trace, labels)``: the trace and, per parameter or buffer, the labels of its dimensions.
    """
    ways = default_inputs(model) if example_inputs is None else given_inputs(model, example_inputs)
    failures = []
    for way in ways:
        trace = Trace(equations=[] if log else None)
        labels = label_parameters(trace, model)
        first = "input_ids" if "input_ids" in way else next(iter(way), "")
        for key, value in way.items():
            if isinstance(value, torch.Tensor):
                tokens = key == first and not value.is_floating_point()
                trace.set(value, Info([None] * value.dim(), from_tokens=tokens))
        try:
            with (
                torch.inference_mode(False),  # inside, operators reach this mode in other pieces
                torch.no_grad(),
                torch.device("meta"),
                module_paths(trace, model),
                LabelMode(trace, remember),
                Spelling(trace),
            ):
                out = model(**way)
        except Exception as error:
            failures.append(f"with {', '.join(way)}: {type(error).__name__}: {error}")
            continue
        trace.operator = "the model's output"
        returned = _outputs(out)
        if not returned:
            raise DiscoveryError(
                f"{type(model).__name__} returns {type(out).__name__}, in which no tensor was found, so the "
                "sizes that its caller counts on are unknown; return the logits, or an object that holds "
                "them as .logits"
            )
        for tensor in returned:
            for dim in trace.dims(tensor):
                if isinstance(dim, np.ndarray):
                    trace.block(dim, "the model returns it: its indices are what the caller reads")
                    trace.record("returned", dim)
        return trace, labels
    raise DiscoveryError(
        f"{type(model).__name__} could not be run on the meta device, so its couplings are unknown. Tried "
        + "; ".join(line[:300] for line in dict.fromkeys(failures))
        + ". Pass example_inputs={name: tensor} with the inputs of one forward call; a model whose forward "
        "branches on values of its data cannot be discovered."
    )


def _outputs(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if not isinstance(out, (Mapping, list, tuple)):  # an object of the model's own
        out = getattr(out, "__dict__", {})
    if isinstance(out, Mapping):
        first = out.get("logits", out.get("last_hidden_state"))
        out = [first] if first is not None else list(out.values())
    return [tensor for part in out for tensor in _outputs(part)] if isinstance(out, (list, tuple)) else []
