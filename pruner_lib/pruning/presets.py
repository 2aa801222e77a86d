"""Recipes by name: scope, kinds and ranking that go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pruner_lib.pruning.ranking import GlobalRanking


@dataclass(frozen=True)
class Preset:
    """What ``plan_pruning`` uses where its caller gives nothing.

    Attributes:
        scope: ``"local"`` or ``"global"``.
        kinds: which kinds to prune, one name or several.
        ranking: how the global scope compares them.
    """

    scope: str = "local"
    kinds: tuple[str, ...] = ("attention_head", "mlp_neuron")
    ranking: GlobalRanking = field(default_factory=GlobalRanking)

    def __post_init__(self) -> None:
        given: Any = self.kinds
        object.__setattr__(self, "kinds", (given,) if isinstance(given, str) else tuple(given))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset(),
        "one_ranking": Preset(scope="global"),
        "best": Preset(
            scope="global",
            ranking=GlobalRanking(
                standardise="none", weigh="params", floor={"attention_head": 0.3, "mlp_neuron": 0.2}
            ),
        ),
    }
)
"""``paper``: every family loses the same share, as in LLM-Pruner. ``one_ranking``: the global defaults.
``best``: one ranking of nats per parameter, for scores that ``scale_to_loss`` made, with ``compensate=``
where the cut will be compensated; the best recipe measured here (docs/quality). On other scores it compares
what cannot be compared."""
