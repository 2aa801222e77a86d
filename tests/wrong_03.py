"""Wrong answers to the exercises of notebook 03."""


def count_removed(scores, ratio):
    return min(int(ratio * len(scores) + 0.5), len(scores) - 1)


def removes_the_highest(scores, ratio):
    return sorted(scores.argsort()[: len(scores) - count_removed(scores, ratio)].tolist())


def llama(
    channels, heads, neurons, layers, vocabulary, pruned, ratio, *, parts=("q", "k", "v", "o"), norms=2
):
    """LLaMA's parameters, with parts to leave out."""

    def layer(share):
        attention = len(parts) * 128 * round(heads * share)
        return channels * (attention + 3 * round(neurons * share) + norms)

    whole = (layers - pruned) * layer(1) + pruned * layer(1 - ratio)
    return whole + 2 * vocabulary * channels + (channels if norms else 0)


WRONG = {
    "3.1": {
        "the groups that go": lambda s, r: sorted(s.argsort()[: count_removed(s, r)].tolist()),
        "the highest went": removes_the_highest,
        "not by their scores": lambda s, r: s.argsort()[count_removed(s, r) :].tolist(),
        "that rounds to": lambda s, r: sorted(s.argsort()[int(r * len(s)) :].tolist()),
        "Halves are rounded upwards": lambda s, r: sorted(s.argsort()[round(r * len(s)) :].tolist()),
        "one always stays": lambda s, r: sorted(s.argsort()[int(r * len(s) + 0.5) :].tolist()),
    },
    "3.2": {
        "LLaMA has both": lambda *sizes: llama(*sizes) - sizes[0] * sizes[4],
        "two a layer and one at the end": lambda *sizes: llama(*sizes, norms=0),
        "last norm is missing": lambda *sizes: llama(*sizes) - sizes[0],
        "only `pruned_layers` of them": lambda *s: llama(*s[:5], s[3] if s[5] else 0, s[6]),
        "Off by a factor": lambda *sizes: llama(*sizes, parts=("q", "k", "v")),
        "None.*return": lambda *sizes: None,
    },
    "3.3": {
        "down has shape": lambda gate, up, down, keep: (gate[keep], up[keep], down),
        "gate has shape": lambda gate, up, down, keep: (gate[:, keep], up[:, keep], down[keep]),
        "up has shape": lambda gate, up, down, keep: (gate[keep], up, down[:, keep]),
        "same neurons in the same order": lambda g, u, d, keep: (g[keep], u[keep], d[:, sorted(keep)]),
        "three matrices": lambda gate, up, down, keep: gate[keep],
    },
}
