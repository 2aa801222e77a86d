"""How much each layer matters: the perplexity when it alone is pruned."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from pruner_lib.assets.files import write_whole
from pruner_lib.discovery import DependencyMap
from pruner_lib.discovery.units import UNITS
from pruner_lib.discovery.zeroing import zeroed_in_place
from pruner_lib.importance.calibration import (
    check_batches,
    default_size,
    mean_loss,
    memory_advice,
    micro_batches,
    untouched,
)
from pruner_lib.pruning.ladders import Scores
from pruner_lib.pruning.planning import plan_pruning

FORMAT = "pruner_lib.sensitivity"
TOGETHER = "all kinds"


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """Perplexity of the model when one layer alone is pruned, layer by layer.

    Attributes:
        dense: perplexity of the unpruned model on the same text.
        perplexity: curve (``"all kinds"``, or a kind) to one perplexity per layer; None where the layer
            has no such family.
        ratio: share of the layer's groups that went.
        source: the text, in words; None if not said.
    """

    dense: float
    perplexity: Mapping[str, tuple[float | None, ...]]
    ratio: float
    source: str | None = None

    def __post_init__(self) -> None:
        curves = {name: tuple(values) for name, values in self.perplexity.items()}
        object.__setattr__(self, "perplexity", MappingProxyType(curves))

    def rises(self, curve: str | None = None) -> tuple[float, ...]:
        """Perplexity over that of the dense model, per layer; 1 where nothing was pruned."""
        values = self.perplexity[next(iter(self.perplexity)) if curve is None else curve]
        return tuple(1.0 if value is None else value / self.dense for value in values)

    def sensitive(self, limit: float | None = None) -> tuple[int, ...]:
        """Layers whose perplexity rises by more than ``limit`` (0.1 for a tenth).

        Args:
            limit: if not given, three times the median rise of all layers.
        """
        rises = [rise - 1 for rise in self.rises()]
        bound = 3 * max(median(rises), 0.0) if limit is None else limit
        return tuple(layer for layer, rise in enumerate(rises) if rise > bound)

    def propose(self, limit: float | None = None) -> range:
        """The layers to prune: all but the sensitive ones at both ends, and what lies outside of those.

        A sensitive layer in the first third moves the start behind it, one in the last third moves the end
        before it. Sensitive layers in the middle stay in; protect them by name if need be.

        Example: of 6 layers, 0 and 1 sensitive: ``range(2, 6)``.

        Args:
            limit: as for :meth:`sensitive`.

        Returns:
            Ready for ``plan_pruning(…, layers=…)``; never empty.
        """
        count = len(self.rises())
        third = max(count // 3, 1)
        sensitive = self.sensitive(limit)
        first = max((layer + 1 for layer in sensitive if layer < third), default=0)
        last = min((layer for layer in sensitive if layer >= count - third), default=count)
        return range(first, last) if first < last else range(count)

    def __repr__(self) -> str:
        proposed = self.propose()
        where = f", {self.source}" if self.source else ""
        lines = [
            f"Sensitivity: each layer alone without {self.ratio:.0%} of its groups; dense perplexity "
            f"{self.dense:.2f}{where}",
            f"  proposed layers: {proposed.start} to {proposed.stop - 1}",
        ]
        for name, values in self.perplexity.items():
            shown = " ".join("–" if value is None else f"{value / self.dense:.2f}" for value in values)
            lines.append(f"  {name}, times dense: {shown}")
        return "\n".join(lines)

    def plot(self, **options: Any) -> Any:
        """One marker per layer and curve, the proposed layers shaded; see ``pruner_lib.display``."""
        from pruner_lib import display

        return display.plot_sensitivity(self, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file, replaced whole or not at all.

        Args:
            path: the file to write; its folder must exist.
        """
        document = {
            "format": FORMAT,
            "version": 1,
            "dense": self.dense,
            "ratio": self.ratio,
            "source": self.source,
            "perplexity": {name: list(values) for name, values in self.perplexity.items()},
        }
        return write_whole(Path(path), json.dumps(document, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not a file of a sensitivity scan, or an incomplete one.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != FORMAT or document["version"] != 1:
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            fields = {name: document[name] for name in ("dense", "perplexity", "ratio", "source")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no sensitivity scan, or not all of it: {error!r}") from error
        return cls(**fields)


def scan_sensitivity(
    model: nn.Module,
    dependencies: DependencyMap,
    scores: Scores,
    batches: Tensor,
    *,
    ratio: float = 0.5,
    kinds: str | Iterable[str] = ("attention_head", "mlp_neuron"),
    separate: bool = False,
    micro_batch_size: int | None = None,
    source: str | None = None,
) -> Sensitivity:
    """Prune each layer alone, measure, put it back: which layers can the model do least without?

    For every layer the lowest-scored ``ratio`` of its groups is zeroed, which gives the logits of the cut
    model, and the perplexity exp(mean cross-entropy) of the batches is taken. One forward pass over them
    per layer and curve. The weights come back bit for bit, also after an exception.

    Example:
        >>> scan = scan_sensitivity(model, dependencies, scores, batches)
        >>> plan = plan_pruning(dependencies, scores, ratio=0.25, layers=scan.propose())

    Args:
        model: a causal language model.
        dependencies: what ``discover`` found in it.
        scores: choose the groups; one tensor ``[size]`` per family.
        batches: token ids ``[N, L]``; other text than the scores were made from is best.
        ratio: share of the layer's groups that go, in (0, 1).
        kinds: what is pruned.
        separate: one curve per kind besides the one of all kinds together.
        micro_batch_size: sequences run at once; None for about 2048 tokens.
        source: what the text is, for the record.

    Returns:
        Perplexity per layer, with a proposal.

    Raises:
        ValueError: a ratio outside (0, 1), unusable batches, kinds without families in any layer or of
            layers dropped whole, missing scores.
        FloatingPointError: a loss that is NaN or infinite.
        MemoryError: the device ran out of memory.

    Source: layer sensitivity, Li et al. (arXiv 1608.08710), section 3.2; LLM-Pruner keeps the first
        and last layers by hand.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio {ratio} is outside (0, 1): it is the share of each layer's groups that go")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if set(kinds) & set(UNITS):
        raise ValueError(
            f"kinds {', '.join(kinds)}: layers dropped whole have no share of groups; score_layers says how "
            "much each of them matters"
        )
    batches = check_batches(model, batches)
    pieces = micro_batches(batches, default_size(batches) if micro_batch_size is None else micro_batch_size)
    plan = plan_pruning(dependencies, scores, ratio=ratio, kinds=kinds)
    spanning = [name for name in plan.removal if dependencies.family(name).layer is None]
    if spanning:
        raise ValueError(f"{spanning[0]} spans all layers, so no layer loses it alone; leave its kind out")
    curves: dict[str, tuple[str, ...]] = {TOGETHER: kinds}
    if separate and len(kinds) > 1:
        curves |= {kind: (kind,) for kind in kinds}
    with untouched(model), memory_advice(batches):
        dense = mean_loss(model, pieces)
        found = {
            name: tuple(
                _perplexity_without(
                    model, dependencies, _of_layer(plan.removal, dependencies, layer, own), pieces
                )
                for layer in range(dependencies.num_layers)
            )
            for name, own in curves.items()
        }
    return Sensitivity(math.exp(min(dense, 700.0)), found, ratio, source)


def _of_layer(
    removal: Mapping[str, Sequence[int]], dependencies: DependencyMap, layer: int, kinds: tuple[str, ...]
) -> dict[str, Sequence[int]]:
    families = [dependencies.family(name) for name in removal]
    return {f.name: removal[f.name] for f in families if f.layer == layer and f.kind in kinds}


def _perplexity_without(
    model: nn.Module, dependencies: DependencyMap, removal: Mapping[str, Sequence[int]], pieces: list[Tensor]
) -> float | None:
    if not removal:
        return None
    if any(dependencies.family(name).normed_by for name in removal):
        loss = mean_loss(dependencies.zero(model, removal).eval(), pieces)  # its norms look past the groups
    else:
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors.update(model.named_buffers(remove_duplicate=False))
        families = ((dependencies.family(name), groups) for name, groups in removal.items())
        with zeroed_in_place(
            tensors, [(piece, groups) for family, groups in families for piece in family.slices]
        ):
            loss = mean_loss(model, pieces)
    return math.exp(min(loss, 700.0))
