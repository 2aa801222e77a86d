"""What a plan will cost, from shapes alone, fast enough for a slider."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from torch import nn

from pruner_lib.discovery.tracing import meta_copy
from pruner_lib.evaluation import Cost, count_cost
from pruner_lib.pruning import PruningPlan, prune


class PlanCost:
    """Costs of any plan for one model, without cutting it.

    A linear layer of [out, in] weights does out·in multiply-accumulates a token. Attention's two
    products do seq² times (query width + output width) a sequence; both widths are that of the matrix
    that reads the heads. If this sum does not give exactly what ``count_cost`` counts on the dense
    model, the plan is carried out on a model without weights and counted there, which takes seconds.

    Args:
        model: the dense model; on the meta device is fine.
        batch_size: sequences of the counted pass.
        seq_len: tokens of each.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 1, seq_len: int = 64) -> None:
        self.dense = count_cost(model, batch_size=batch_size, seq_len=seq_len)
        self._skeleton = meta_copy(model)
        modules = model.named_modules()
        self._linear = [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]

    def __call__(self, plan: PruningPlan) -> Cost:
        """The cost of the model that ``prune`` would return.

        Args:
            plan: made for this model.
        """
        if self._macs(plan, dict(plan.dependencies.shapes)) == self.dense.macs:
            return self._from_shapes(plan)
        size, length = self.dense.batch_size, self.dense.seq_len
        return count_cost(prune(self._skeleton, plan), batch_size=size, seq_len=length)

    def _from_shapes(self, plan: PruningPlan) -> Cost:
        dense = self.dense
        cache = dense.kv_cache_bytes_per_token
        heads = plan.dependencies.select(kind="attention_head", cuttable=False)
        total = sum(family.size for family in heads)
        if cache and total:
            cache = cache * sum(plan.kept_sizes[family.name] for family in heads) // total
        return replace(
            dense,
            params=plan.params_after,
            macs=self._macs(plan, plan.new_shapes()),
            weight_bytes=dense.weight_bytes * plan.params_after // dense.params,
            kv_cache_bytes_per_token=cache,
        )

    def _macs(self, plan: PruningPlan, shapes: dict[str, tuple[int, ...]]) -> int:
        aliases = plan.dependencies.aliases
        linear = sum(prod(shapes[aliases.get(name, name)]) for name in self._linear)
        readers = [f.slices[-1] for f in plan.dependencies.select(kind="attention_head", cuttable=False)]
        width = sum(shapes[reader.parameter][reader.dim] for reader in readers)
        tokens = self.dense.batch_size * self.dense.seq_len
        return tokens * linear + 2 * tokens * self.dense.seq_len * width
