"""Wrong answers to the exercises of notebook 05."""

from math import exp, hypot, sqrt

from torch.nn.functional import cross_entropy


def losses(logits, ids, *, shift=1):
    size = logits.shape[1] - shift
    return cross_entropy(logits[:, :size].transpose(1, 2), ids[:, shift:], reduction="none")


WRONG = {
    "5.1": {
        "their own token": lambda logits, ids: exp(losses(logits, ids, shift=0).mean()),
        "the mean loss": lambda logits, ids: losses(logits, ids).mean(),
        "windows are not averaged": lambda logits, ids: losses(logits, ids).mean(1).exp().mean(),
        "not the other way round": lambda logits, ids: losses(logits, ids).exp().mean(),
        "not with 2": lambda logits, ids: 2 ** losses(logits, ids).mean(),
        "None.*return": lambda logits, ids: None,
    },
    "5.3": {
        "different items": lambda a, b: ((b - a).mean(), hypot(a.std(), b.std()) / sqrt(len(a))),
        "The sign": lambda a, b: ((a - b).mean(), (a - b).std() / sqrt(len(a))),
        "spread of one difference": lambda a, b: ((b - a).mean(), (b - a).std()),
        "not by n": lambda a, b: ((b - a).mean(), (b - a).std() / len(a)),
        "n − 1": lambda a, b: ((b - a).mean(), (b - a).std(correction=0) / sqrt(len(a))),
        "first model alone": lambda a, b: ((b - a).mean(), a.std() / sqrt(len(a))),
        "must return": lambda a, b: (b - a).mean(),
    },
    "5.2": {
        "two tensors": lambda heads, dim, size: sum(heads) * dim * size,
        "not bytes": lambda heads, dim, size: 2 * sum(heads) * dim,
        "Layers may differ": lambda heads, dim, size: 2 * heads[0] * len(heads) * dim * size,
        "one layer": lambda heads, dim, size: 2 * heads[0] * dim * size,
    },
}
