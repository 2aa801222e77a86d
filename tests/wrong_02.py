"""Wrong answers to the exercises of notebook 02."""


def strided(scores, heads, kv_heads):
    return scores.view(heads, -1).sum(1).view(-1, kv_heads).sum(0)


def lowest(values, ratio):
    return values.argsort()[: round(ratio * len(values))]


def shared(first, second):
    return len(set(first.tolist()) & set(second.tolist()))


WRONG = {
    "2.1": {
        "LLM-Pruner's mistake": strided,
        "one score per query head": lambda scores, heads, kv_heads: scores.view(heads, -1).sum(1),
        "not their mean": lambda scores, heads, kv_heads: scores.view(kv_heads, -1).mean(1),
        "Split the channels": lambda scores, heads, kv_heads: scores.view(kv_heads, -1).max(1).values,
    },
    "2.2": {
        "half before the second": lambda w, g: (w * g.mean(0) - w**2 * (g**2).mean(0)).abs(),
        "not the square of the mean": lambda w, g: (w * g.mean(0) - 0.5 * w**2 * g.mean(0) ** 2).abs(),
        "is subtracted": lambda w, g: (w * g.mean(0) + 0.5 * w**2 * (g**2).mean(0)).abs(),
        "sign is kept": lambda w, g: w * g.mean(0) - 0.5 * w**2 * (g**2).mean(0),
        "first order alone": lambda w, g: (w * g.mean(0)).abs(),
        "not a sum": lambda w, g: (w * g.mean(0) - 0.5 * w**2 * (g**2).sum(0)).abs(),
    },
    "2.3": {
        "a number of groups": lambda s, t, ratio: shared(lowest(s, ratio), lowest(t, ratio)),
        "not by all groups": lambda s, t, ratio: shared(lowest(s, ratio), lowest(t, ratio)) / len(s),
        "the highest groups": lambda s, t, ratio: (
            shared(lowest(-s, ratio), lowest(-t, ratio)) / round(ratio * len(s))
        ),
        "place by place": lambda s, t, ratio: (lowest(s, ratio) == lowest(t, ratio)).double().mean(),
    },
}
