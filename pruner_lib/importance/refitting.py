r"""What the readers of a set of groups become when they are fitted again without it.

A reader with weights W reads h, of which the set S goes and K stays. What it returned, W h, is predicted
from what stays, over the tokens of the dense model:

    W'_K = W_K + W_S C_SK (C_KK + λ c I)⁻¹,   C = Σ_t h_t h_tᵀ / rms_t²,   c = mean of the diagonal of C_KK

which is the ridge fit of compensation with earlier layers whole. With a bias all is centred first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pruner_lib.discovery.families import GroupFamily
from pruner_lib.discovery.grouping import layer_list
from pruner_lib.importance.calibration import default_size, micro_batches
from pruner_lib.importance.streams import Stream, state_before, token_weights
from pruner_lib.readers.fitting import TOKENS_PER_CHANNEL, Statistics, ridge_fit
from pruner_lib.readers.matrices import as_matrix, matrices, residual_writers, set_matrix

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

Weights = Mapping[nn.Module, tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class LayerReaders:
    """The readers of one layer: ``(weight, input dimension)`` to module and its sums."""

    found: Mapping[tuple[str, int], tuple[nn.Module, Statistics]]
    ridge: float
    thin: Mapping[str, int]  # readers of more channels than the text can fit

    def without(self, family: GroupFamily, groups: Sequence[int]) -> Weights:
        """New weights ``[out, in]`` (zero where the groups were read) and biases of those that read a family.

        Empty where none is a linear module that sees every token: such readers stay as they are, in
        compensation too.
        """
        gone: dict[tuple[str, int], list[np.ndarray]] = {}
        for piece in family.slices:
            if (piece.parameter, piece.dim) in self.found:
                gone.setdefault((piece.parameter, piece.dim), []).append(piece.of(groups))
        return {self.found[key][0]: self._fit(*self.found[key], np.concatenate(gone[key])) for key in gone}

    def _fit(self, module: nn.Module, sums: Statistics, gone: np.ndarray) -> tuple[Tensor, Tensor | None]:
        weight, bias = as_matrix(module), getattr(module, "bias", None)
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[torch.from_numpy(gone).to(weight.device)] = False
        kept = stays.nonzero()[:, 0]
        wide = None if bias is None else bias.detach().double()
        try:
            fit, moved = ridge_fit(sums.of_reader(weight, wide, kept), weight[:, kept], wide, self.ridge)
        except torch.linalg.LinAlgError:  # all that stays is zero
            fit, moved = weight[:, kept], wide
        return torch.zeros_like(weight).index_copy_(1, kept, fit), moved


class Readers:
    """Sums over what readers read, one layer at a time: ``[in, in]`` of that layer's alone.

    Args:
        model: the dense model, in evaluation mode.
        dependencies: what ``discover`` found in it.
        families: whose readers.
        batches: token ids ``[N, L]`` that the fits see.
        ridge: λ.
        size: sequences run at once.

    Raises:
        NotAChain: the layers do not simply hand one hidden state on.
    """

    def __init__(
        self,
        model: nn.Module,
        dependencies: DependencyMap,
        families: Iterable[GroupFamily],
        batches: Tensor,
        ridge: float,
        size: int | None = None,
    ) -> None:
        self._stream = Stream(model, micro_batches(batches, size or default_size(batches)))
        self._path, _ = layer_list(model)
        self._dependencies, self._ridge = dependencies, ridge
        shared = {*dependencies.aliases, *dependencies.aliases.values()}
        slices = {(piece.parameter, piece.dim) for family in families for piece in family.slices}
        self._read = {(weight, dim) for weight, dim in slices if weight not in shared}

    def next_layer(self) -> LayerReaders:
        """Of the layer that comes next.

        Raises:
            FloatingPointError: what a reader reads is NaN or infinite.
        """
        stream, prefix = self._stream, f"{self._path}.{self._stream.at}"
        layer = stream.layers[stream.at]
        found = ((path, (weight, dim)) for path, weight, dim, _ in matrices(layer, f"{prefix}."))
        linear = {path: key for path, key in found if key in self._read}
        writers = residual_writers(self._dependencies, layer, prefix)
        sums: dict[str, Statistics] = {}
        after: list[Tensor] = []
        factor = None
        for number, hidden in enumerate(stream.hidden):
            out, written, read = stream.read(number, writers, linear)
            factor = factor if after else stream.factor(writers, written, out)
            for path, inputs in read.items():
                _add(sums, layer, path, inputs, state_before(hidden, written, path, factor))
            after.append(out)
        stream.advance(after)
        tokens = sum(hidden.shape[:-1].numel() for hidden in after)
        sound = {
            linear[path]: (layer.get_submodule(path), total)
            for path, total in sums.items()
            if total.tokens == tokens  # an expert that a router sends a part of them stays as it is
        }
        for (weight, _), (_, total) in sound.items():
            if not total.finite:
                raise FloatingPointError(
                    f"what {weight} reads is NaN or infinite on the text that compensate= was given; no "
                    "scores made. Try float32 or bfloat16 weights"
                )
        widths = {weight: len(total.second) for (weight, _), (_, total) in sound.items()}
        thin = {weight: width for weight, width in widths.items() if tokens < TOKENS_PER_CHANNEL * width}
        return LayerReaders(sound, self._ridge, thin)


def _add(sums: dict[str, Statistics], layer: nn.Module, path: str, inputs: Tensor, state: Tensor) -> None:
    """Take in what one reader read on one piece."""
    rows = inputs.flatten(0, -2)
    if len(rows) != len(state):
        return
    centred = getattr(layer.get_submodule(path), "bias", None) is not None
    empty = Statistics.empty(rows.shape[1], 0, rows.device, centred=centred)
    sums.setdefault(path, empty).add(rows, rows[:, :0], token_weights(state).to(rows.device))


@contextmanager
def refitted(weights: Weights) -> Iterator[None]:
    """New weights and biases in the model itself; put back bit for bit on the way out."""
    changed = [parameter for module in weights for parameter in module.parameters()]
    saved = [(parameter, parameter.detach().clone()) for parameter in changed]
    try:
        for module, (weight, bias) in weights.items():
            set_matrix(module, weight, bias)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved:
                parameter.copy_(values)
