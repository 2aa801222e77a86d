"""The coarsest granularity: how much a layer, or the attention or MLP in it, matters as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruner_lib.discovery.units import UNITS, depth_units, units_of_kind
from pruner_lib.importance.calibration import (
    check_batches,
    check_finite,
    default_size,
    mean_loss,
    memory_advice,
    micro_batches,
    token_losses,
    untouched,
)
from pruner_lib.importance.scores import ImportanceScores
from pruner_lib.importance.skipping import first_output, first_tensor, skipped

if TYPE_CHECKING:
    from pruner_lib.discovery import DependencyMap

MEASURES = ("influence", "loss")


def score_layers(
    model: nn.Module,
    dependencies: DependencyMap,
    batches: Tensor,
    *,
    unit: str | Iterable[str] = "block",
    measure: str = "influence",
    micro_batch_size: int | None = None,
    source: str | None = None,
    seed: int | None = None,
) -> ImportanceScores:
    r"""How much each layer, attention or MLP matters, one score ``[1]`` per unit.

    Block influence compares the hidden state x_t of every token with and without the unit:

        influence = 1 − mean_t cos(x_t without, x_t with)

    For a layer these are its input and its output; for a sublayer the layer's outputs without it and with
    it. 0 is a unit that turns no hidden state. ``"loss"`` is the rise of the mean cross-entropy (nats per
    token) when the unit is skipped: one forward pass per unit, where influence takes one in all.

    Example:
        >>> scores = score_layers(model, dependencies, batches)
        >>> plan_pruning(dependencies, scores, target_params=0.8, kinds="block")

    Args:
        model: a causal language model; comes back as it was.
        dependencies: what ``discover`` found in it.
        batches: token ids ``[N, L]``.
        unit: ``"block"``, ``"attention"`` or ``"mlp"``, or several.
        measure: ``"influence"`` or ``"loss"``.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        source: what the text was, recorded with the scores.
        seed: what the batches were drawn with, recorded.

    Returns:
        Scores under the units' names (``"layers.5"``, ``"layers.5.mlp"``).

    Raises:
        ValueError: unusable batches, an unknown unit or measure.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.

    Source: block influence, ShortGPT (arXiv 2403.03853), section 2.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; valid are {', '.join(MEASURES)}")
    units = units_by_path(dependencies, unit)
    batches = check_batches(model, batches)
    size = default_size(batches) if micro_batch_size is None else micro_batch_size
    pieces = micro_batches(batches, size)
    with untouched(model), memory_advice(batches):
        if measure == "influence":
            found = _influence(model, units, pieces)
        else:
            dense = mean_loss(model, pieces)
            found = {name: loss_without(model, units, [name], pieces) - dense for name in units}
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()}
    return ImportanceScores(
        scores=values,
        criterion=f"layer_{measure}",
        source=source,
        seed=seed,
        num_samples=len(batches),
        seq_len=batches.shape[1],
    )


def units_by_path(dependencies: DependencyMap, unit: str | Iterable[str]) -> dict[str, str]:
    """Name to path of all units of some kinds."""
    kinds = [unit] if isinstance(unit, str) else list(unit)
    paths = depth_units(dependencies)
    for kind in kinds:
        if kind not in UNITS:
            raise ValueError(f"unknown unit {kind!r}; valid are {', '.join(UNITS)}")
    return {name: paths[name] for kind in kinds for name in units_of_kind(dependencies, kind)}


@contextmanager
def _without(model: nn.Module, units: Mapping[str, str], names: Iterable[str]) -> Iterator[None]:
    names = list(names)
    layers = [units[name] for name in names if name.count(".") == 1]
    with skipped(model, layers, [units[name] for name in names if name.count(".") > 1]):
        yield


def loss_without(
    model: nn.Module, units: Mapping[str, str], names: Iterable[str], pieces: list[Tensor]
) -> float:
    """Mean cross-entropy of the model that skips the named units."""
    with _without(model, units, names):
        return mean_loss(model, pieces)


def _influence(model: nn.Module, units: Mapping[str, str], pieces: list[Tensor]) -> dict[str, float]:
    """1 − mean cosine per unit, all units in one pass: a layer runs once more for each of its sublayers."""
    totals = dict.fromkeys(units, 0.0)
    tokens = 0

    def compare(name: str, path: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name.count(".") == 1:
                other = first_tensor(args, kwargs)
            else:
                with skipped(model, sublayers=[path]):
                    other = first_output(layer.forward(*args, **kwargs))
            both = first_output(output).double(), other.double()
            totals[name] += float(nn.functional.cosine_similarity(*both, dim=-1).sum())

        return hook

    handles = []
    try:
        for name, path in units.items():
            layer = path if name.count(".") == 1 else path.rpartition(".")[0]
            hook = compare(name, path)
            handles.append(model.get_submodule(layer).register_forward_hook(hook, with_kwargs=True))
        with torch.no_grad():
            for start, piece in zip(itertools.accumulate(map(len, pieces), initial=0), pieces, strict=False):
                check_finite(model, piece, token_losses(model, piece), start)
                tokens += piece.numel()
    finally:
        for handle in handles:
            handle.remove()
    return {name: 1 - total / tokens for name, total in totals.items()}
