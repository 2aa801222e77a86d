"""What a plan will cost, fast enough for a slider."""

from __future__ import annotations

from torch import nn

from pruner_lib.evaluation import Cost, count_cost
from pruner_lib.pruning import PruningPlan


class PlanCost:
    """Costs of any plan for one model, beside the dense one's, at a chosen batch and length.

    The dense cost is counted at once; the first plan traces the model, later ones take less than a
    millisecond (``PruningPlan.cost``).

    Args:
        model: the dense model; on the meta device is fine.
        batch_size: sequences of the counted pass.
        seq_len: tokens of each.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 1, seq_len: int = 64) -> None:
        self.dense = count_cost(model, batch_size=batch_size, seq_len=seq_len)

    def __call__(self, plan: PruningPlan) -> Cost:
        """The cost of the model that ``prune`` would return.

        Args:
            plan: made for this model.
        """
        return Cost(**vars(plan.cost(batch_size=self.dense.batch_size, seq_len=self.dense.seq_len)))
