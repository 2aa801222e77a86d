"""Wrong answers to the exercises of notebook 07."""

import pruner_lib as pl


def ratio(dependencies, scores, fits, steps=range(20)):
    """The first ratio on the way whose cost fits."""
    for step in steps:
        if fits(pl.plan_pruning(dependencies, scores, ratio=step / 20).cost()):
            return step / 20
    return None


WRONG = {
    "7.1": {
        "counted twice": lambda params, trained: 2 * params + 16 * trained,
        "two moments": lambda params, trained: 2 * (params - trained) + 12 * trained,
        "Only what is trained": lambda params, trained: 16 * params,
        "Frozen parameters stay": lambda params, trained: 16 * trained,
    },
    "7.2": {
        "a cache of its own": lambda cost, bandwidth, context, batch_size: (
            batch_size * bandwidth / (cost.weight_bytes + context * cost.kv_cache_bytes_per_token)
        ),
        "a token for each sequence": lambda cost, bandwidth, context, batch_size: (
            bandwidth / (cost.weight_bytes + batch_size * context * cost.kv_cache_bytes_per_token)
        ),
        "read as well": lambda cost, bandwidth, context, batch_size: (
            batch_size * bandwidth / cost.weight_bytes
        ),
    },
    "7.3": {
        "largest ratio": lambda dependencies, scores, limit: ratio(
            dependencies, scores, lambda cost: cost.weight_bytes <= limit, range(19, -1, -1)
        ),
        "The limit is in bytes": lambda dependencies, scores, limit: ratio(
            dependencies, scores, lambda cost: cost.params <= limit
        ),
        "exactly the limit": lambda dependencies, scores, limit: ratio(
            dependencies, scores, lambda cost: cost.weight_bytes < limit
        ),
    },
}
