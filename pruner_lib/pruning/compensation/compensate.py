"""Fit the readers of removed channels again, layer by layer, so that each returns what it did before."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruner_lib.discovery.grouping import layer_list
from pruner_lib.importance.calibration import (
    check_batches,
    default_size,
    mean_loss,
    memory_advice,
    micro_batches,
    progress_bar,
    untouched,
)
from pruner_lib.importance.chain import NotAChain
from pruner_lib.importance.streams import Stream, state_before, token_weights
from pruner_lib.pruning.compensation.readers import Reader, left_as_cut, readers_of
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.readers.fitting import TOKENS_PER_CHANNEL, Fit, Statistics, best_fit, mean_fit, too_few
from pruner_lib.readers.matrices import residual_writers, set_matrix

METHODS = ("ridge", "bias")
WEIGHTING = ("rms", "none")


@dataclass(frozen=True)
class Compensation:
    """How readers are fitted again.

    Attributes:
        batches: calibration token ids ``[N, L]``, N ≥ 2. More are better: tens of thousands of tokens.
        method: ``"ridge"`` fits the whole matrix, ``"bias"`` only puts the mean of its output right.
        correct: whether a reader that adds to the residual stream is also to make up for what the layers
            before it already do wrong.
        ridges: the λ to choose from, per reader, on held-out sequences.
        holdout: share of the sequences that no fit sees, on which λ is chosen and the result is judged.
        weighting: ``"rms"`` divides each token's squared error by the mean square of its residual state,
            as the norms that read it do (the first token of a text can outweigh all others a thousandfold);
            ``"none"`` takes all tokens alike.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        progress: show a bar; None shows it in a terminal.

    Raises:
        ValueError: an unknown method or weighting, no λ or a negative one, a share outside (0, 1).
    """

    batches: Tensor
    method: str = "ridge"
    correct: bool = True
    ridges: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    holdout: float = 0.125
    weighting: str = "rms"
    micro_batch_size: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for label, value, valid in (
            ("method", self.method, METHODS),
            ("weighting", self.weighting, WEIGHTING),
        ):
            if value not in valid:
                raise ValueError(f"unknown {label} {value!r}; valid are {', '.join(valid)}")
        ridges = self.ridges if isinstance(self.ridges, Sequence) else ()
        if not ridges or not all(0 <= ridge < math.inf for ridge in ridges):
            raise ValueError(f"ridges must be one or more numbers of at least 0, not {self.ridges}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size must be at least 1, not {self.micro_batch_size}; None takes about 2048 "
                "tokens"
            )
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must lie between 0 and 1, not {self.holdout}")

    def split(self) -> int:
        """How many sequences, the first ones, are fitted on."""
        held = max(1, round(self.holdout * len(self.batches)))
        return max(1, len(self.batches) - held)


@dataclass(frozen=True)
class FittedReader:
    """One reader: its weight, the λ chosen for it, and its output's error on held-out tokens.

    Attributes:
        weight: name of the parameter in the dense model.
        ridge: λ; infinite where the weights stayed as they were.
        before, after: Σ‖W h − T‖² / Σ‖T‖² as cut, and fitted again.
        inputs: channels that it reads.
    """

    weight: str
    ridge: float
    before: float
    after: float
    inputs: int


@dataclass(frozen=True)
class Compensated:
    """What compensation did.

    Attributes:
        model: the model with readers fitted again.
        readers: one entry per reader, in the order of execution.
        left: parameters that read removed channels and could not be fitted.
        loss_before, loss_after: mean cross-entropy on the held-out sequences.
        kept: False where the fitted model was worse there, and ``model`` is the cut one.
    """

    model: nn.Module
    readers: tuple[FittedReader, ...]
    left: tuple[str, ...]
    loss_before: float
    loss_after: float
    kept: bool

    def __str__(self) -> str:
        head = f"{len(self.readers)} readers fitted again; held-out loss {self.loss_before:.3f} → "
        head += f"{self.loss_after:.3f}" + ("" if self.kept else " (worse: the cut model was kept)")
        rows = [
            f"  {r.weight:<50} λ {r.ridge:<6.3g} error {r.before:.3f} → {r.after:.3f}" for r in self.readers
        ]
        left = [f"  left as cut: {name}" for name in self.left]
        return "\n".join([head, *rows, *left])

    __repr__ = __str__


def compensate(
    model: nn.Module, pruned: nn.Module, plan: PruningPlan, settings: Compensation | Tensor
) -> Compensated:
    r"""Fit again what reads the removed channels, in closed form, without gradients.

    Layer by layer, the layers before already fitted. A reader (``o_proj``, ``down_proj`` …) with dense
    weights W and remaining inputs h gets

        W' = argmin_V  Σ_t ‖V h_t − T_t‖² / rms_t²  +  λ c ‖V − W_kept‖²

    where T_t is what it returned in the dense model plus, where it adds to the residual stream, all that the
    stream already lacks there. λ is chosen on held-out sequences for each reader, no change being one of the
    choices; and if the whole model is not better on those, it stays as cut.

    Memory beside the two models: the fitted copy, two hidden states per token, the outputs of one layer's
    readers and one reader's sums ``[in, in]``.

    Args:
        model: the dense model; unchanged.
        pruned: what ``prune(model, plan)`` returned; unchanged.
        plan: how the one became the other.
        settings: or the calibration token ids alone.

    Returns:
        The fitted copy and a record of it.

    Raises:
        ValueError: unusable batches, or a single sequence.
        PruningError: weights on the meta device, or layers that do not hand one hidden state on.
        FloatingPointError: activations that are NaN or infinite; names the module.

    Source: ridge refits of pruned structures as in SlimGPT (arXiv 2412.18110) and earlier second-order work;
    the correction of earlier layers' error is added here.
    """
    settings = as_settings(settings)
    batches = check_batches(model, settings.batches)
    if len(batches) < 2:
        raise ValueError("compensation needs at least 2 calibration sequences: one is held out to choose λ")
    if any(parameter.is_meta for parameter in [*model.parameters(), *pruned.parameters()]):
        raise PruningError("compensation runs text through both models; these have no weights (meta device)")
    fitted = copy.deepcopy(pruned)
    with untouched(model), untouched(fitted), untouched(pruned), torch.no_grad(), memory_advice(batches):
        try:
            readers, left = _Run(model, fitted, plan, settings, batches).readers()
        except NotAChain as error:
            raise PruningError(
                f"cannot compensate {type(model).__name__}: {error}. Recover it by training instead"
            ) from error
        pieces = micro_batches(
            batches[settings.split() :], settings.micro_batch_size or default_size(batches)
        )
        before, after = mean_loss(pruned, pieces), mean_loss(fitted, pieces)
    better = after <= before
    return Compensated(fitted if better else copy.deepcopy(pruned), readers, left, before, after, better)


def as_settings(given: Compensation | Tensor) -> Compensation:
    """What ``compensate=`` was given, as settings.

    Raises:
        TypeError: neither of the two.
    """
    if not isinstance(given, Compensation | Tensor):
        raise TypeError(
            "compensate wants calibration token ids, a LongTensor [N, L] (load_calibration makes them), or "
            f"Compensation(batches, …); got {type(given).__name__}"
        )
    return Compensation(given) if isinstance(given, Tensor) else given


def _even_size(fitted: int, held: int, most: int) -> int:
    """Sequences per piece: one that leaves no remainder, as each shape of a piece takes passes of its own."""
    even = max(size for size in range(1, most + 1) if fitted % size == held % size == 0)
    return even if 8 * even >= most else most


class _Run:
    """One pass over the layers."""

    def __init__(
        self, model: nn.Module, fitted: nn.Module, plan: PruningPlan, settings: Compensation, batches: Tensor
    ) -> None:
        cut = settings.split()
        size = settings.micro_batch_size or _even_size(cut, len(batches) - cut, default_size(batches))
        pieces = [*micro_batches(batches[:cut], size), *micro_batches(batches[cut:], size)]
        self.held = [number >= math.ceil(cut / size) for number in range(len(pieces))]
        self.plan, self.settings, self.model = plan, settings, model
        self.path, self.count = layer_list(model)
        self.dense, self.pruned = Stream(model, pieces), Stream(fitted, pieces)
        self.found: list[FittedReader] = []
        self.thin: dict[str, int] = {}  # readers of more channels than the text can fit
        self.tokens = cut * batches.shape[1]

    def readers(self) -> tuple[tuple[FittedReader, ...], tuple[str, ...]]:
        """Fit all, and say which could not be."""
        bar = progress_bar(self.count, "compensation", self.settings.progress)
        with bar:
            for layer in range(self.count):
                self._layer(layer)
                bar.update()
        left = left_as_cut(self.model, self.plan, {reader.weight for reader in self.found})
        if self.thin:
            warnings.warn(too_few(self.tokens, self.thin), stacklevel=3)
        return tuple(self.found), tuple(left)

    def _layer(self, layer: int) -> None:
        prefix = f"{self.path}.{layer}"
        module = self.dense.layers[layer]
        readers = {reader.path: reader for reader in readers_of(module, prefix, self.plan)}
        writers = residual_writers(self.plan.dependencies, module, prefix)
        outputs, after = [], []
        for piece in range(len(self.dense.hidden)):
            hidden, watched = self.dense.run(piece, {*readers, *writers})
            outputs.append(watched)
            after.append(hidden)
        factor = None
        if self.settings.correct:
            written = {path: out for path, out in outputs[0].items() if path in writers}
            factor = self.dense.factor(writers, written, after[0])
        if f"layers.{layer}" not in self.plan.dropped:
            here = _Layer(self, outputs, [path for path in outputs[0] if path in writers], factor)
            for path in outputs[0]:  # in the order of execution
                if path in readers:
                    here.fit(readers[path])
            self.pruned.advance([self.pruned.run(piece, ())[0] for piece in range(len(after))])
        self.dense.advance(after)


@dataclass
class _Layer:
    """One layer's readers, with what the dense model's modules returned there.

    Attributes:
        run: both streams, standing before this layer.
        outputs: per piece, module path to dense output, in the order of execution.
        writers: paths that add to the residual stream, in that order.
        factor: c of ``after = before + c Σ written``; None where the layer is not of that form.
    """

    run: _Run
    outputs: list[dict[str, Tensor]]
    writers: list[str]
    factor: float | None

    def fit(self, reader: Reader) -> None:
        """Collect the sums of a reader, solve, and write the new weights into the pruned model."""
        run = self.run
        module = dict(run.pruned.layers[run.pruned.at].named_modules()).get(reader.path)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            return  # its sublayer was dropped
        dense = run.dense.layers[run.dense.at].get_submodule(reader.path)
        weight = reader.columns(dense)
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach().double()
        outward, inward = weight.shape
        sums = [Statistics.empty(inward, outward, weight.device, centred=bias is not None) for _ in range(2)]
        for piece, held in enumerate(run.held):
            tokens = self._tokens(piece, reader)
            if tokens is None:
                return
            sums[held].add(*tokens)
        if not (sums[0].finite and sums[1].finite):
            raise FloatingPointError(
                f"compensation: what {reader.weight} reads or should return is NaN or infinite on the "
                "calibration text. Nothing was changed. Try float32 or bfloat16 weights"
            )
        if run.settings.method == "ridge" and sums[0].tokens < TOKENS_PER_CHANNEL * weight.shape[1]:
            run.thin[reader.weight] = weight.shape[1]
        found = self._solve(reader, sums[0], sums[1], weight, bias)
        set_matrix(module, found.weight, found.bias)
        run.found.append(FittedReader(reader.weight, found.ridge, found.before, found.after, weight.shape[1]))

    def _solve(
        self, reader: Reader, fit: Statistics, held: Statistics, weight: Tensor, bias: Tensor | None
    ) -> Fit:
        if self.run.settings.method == "bias":
            return mean_fit(fit, held, weight, bias)
        alike = [each.ridge for each in self.run.found if each.weight.endswith(f".{reader.path}.weight")]
        start = alike[-1] if alike else None  # of the layer before
        return best_fit(fit, held, weight, bias, self.run.settings.ridges, start)

    def _tokens(self, piece: int, reader: Reader) -> tuple[Tensor, Tensor, Tensor] | None:
        """Inputs, targets and weights of one piece's tokens; None where a router picks the tokens.

        The two models may route differently, and then rows of the one belong to other tokens than rows of the
        other, even where there are as many.
        """
        run = self.run
        earlier = self.writers[: self.writers.index(reader.path)] if reader.path in self.writers else []
        inputs, written = run.pruned.run(piece, self._present(earlier), stop=reader.path)
        if inputs is None or reader.path not in self.outputs[piece]:
            return None
        inputs, target = _rows(inputs), _rows(self.outputs[piece][reader.path])
        added = {path: self.outputs[piece][path] for path in self.writers if path in self.outputs[piece]}
        state = state_before(run.dense.hidden[piece], added, reader.path, self.factor).to(target.device)
        if len(inputs) != len(target) or len(target) < len(state):
            return None
        target = _kept(target, reader)
        if self.factor is not None and reader.path in self.writers:
            here = _rows(run.pruned.hidden[piece]).to(target.device)
            here = here + self.factor * sum(map(_rows, written.values()))
            target = target + (_kept(state, reader) - here) / self.factor
        if run.settings.weighting == "none" or len(state) != len(inputs):
            return inputs, target, torch.ones(len(inputs), device=inputs.device)
        return inputs, target, token_weights(state)

    def _present(self, paths: list[str]) -> list[str]:
        """Those that the pruned model still has."""
        layer = self.run.pruned.layers[self.run.pruned.at]
        there = dict(layer.named_modules())
        return [path for path in paths if path in there]


def _rows(state: Tensor) -> Tensor:
    """Tokens as rows."""
    return state.flatten(0, -2)


def _kept(state: Tensor, reader: Reader) -> Tensor:
    return state if reader.kept_out is None else state.index_select(-1, reader.kept_out.to(state.device))
