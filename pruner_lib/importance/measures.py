"""Two ways to say, in nats, how far a change of the model moves what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from pruner_lib.importance.calibration import logits_of, token_losses


class Measure(Protocol):
    """How a changed model compares with itself unchanged.

    Attributes:
        light: whether the reference is one number per sequence, rather than as large as the logits.
    """

    light: bool

    def reference(self, model: nn.Module, piece: Tensor) -> Tensor:
        """What the unchanged model says of token ids ``[n, L]``; one row per sequence."""

    def change(self, model: nn.Module, piece: Tensor, copies: int, reference: Tensor) -> Tensor:
        """``[copies, n]`` in nats, float64, for a model that answers all of them ``copies`` times."""


class Loss:
    """The rise of the mean next-token cross-entropy: what is lost on this text, with its luck."""

    light = True

    def reference(self, model: nn.Module, piece: Tensor) -> Tensor:
        return token_losses(model, piece)

    def change(self, model: nn.Module, piece: Tensor, copies: int, reference: Tensor) -> Tensor:
        losses = token_losses(model, piece.repeat(copies, 1)).view(copies, len(piece))
        return (losses - reference).double().cpu()


class Divergence:
    r"""KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), p the unchanged model's prediction and q the changed one's.

    The mean over tokens. Where text is drawn from p this is what the loss rises by on average, without the
    luck of which token came: the same text tells small changes apart that the loss does not.
    """

    light = False

    def reference(self, model: nn.Module, piece: Tensor) -> Tensor:
        return _log_probabilities(logits_of(model, piece))

    def change(self, model: nn.Module, piece: Tensor, copies: int, reference: Tensor) -> Tensor:
        logits = logits_of(model, piece.repeat(copies, 1))
        rows = [self._row(one, reference[place % len(piece)]) for place, one in enumerate(logits)]
        return torch.stack(rows).view(copies, len(piece)).cpu()

    @staticmethod
    def _row(logits: Tensor, reference: Tensor) -> Tensor:
        """Of one sequence, so that no second tensor of the logits' size is needed."""
        return (reference.exp() * (reference - _log_probabilities(logits))).sum(-1).double().mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    """``[…, L − 1, vocabulary]``: the last token's prediction is of nothing that is known."""
    kept = logits[..., :-1, :]
    return (kept if kept.dtype == torch.float64 else kept.float()).log_softmax(-1)


MEASURES: Mapping[str, Measure] = MappingProxyType({"loss": Loss(), "divergence": Divergence()})
