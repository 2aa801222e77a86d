"""Wrong answers to the exercises of notebook 08."""

from torch.nn import functional

from pruner_lib.course.checks_08 import _rounded


def divergence(first, second, temperature, reduction="batchmean"):
    """KL(second ‖ first) at a temperature, without its square."""
    p, q = ((logits / temperature).log_softmax(-1) for logits in (second, first))
    return functional.kl_div(q, p, log_target=True, reduction=reduction)


def cross_entropy(student, teacher, temperature):
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return -(temperature**2) * (p.exp() * q).sum(-1).mean()


def divided_by_zero(weights):
    blocks = weights.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).reshape(weights.shape)


WRONG = {
    "8.1": {
        "The two are swapped": lambda s, t, temperature: temperature**2 * divergence(t, s, temperature),
        "T² is missing": lambda s, t, temperature: divergence(s, t, temperature) * (temperature > 0),
        "over the vocabulary it is a sum": lambda s, t, temperature: (
            temperature**2 / s.shape[-1] * divergence(s, t, temperature)
        ),
        "sum over tokens": lambda s, t, temperature: temperature**2 * divergence(s, t, temperature, "sum"),
        "cross-entropy": cross_entropy,
    },
    "8.2": {
        "one scale for all": lambda weights: _rounded(weights, weights.numel()),
        "one scale for each row": lambda weights: _rounded(weights, 64),
        "becomes 127": lambda weights: _rounded(weights, levels=128),
        "not towards zero": lambda weights: _rounded(weights, down=True),
        "Nothing was rounded": lambda weights: weights.clone(),
        "block of zeros": divided_by_zero,
    },
    "8.3": {
        "after a refused one": lambda rate, drafted: 1 + rate * drafted,
        "token of its own": lambda rate, drafted: sum(rate**i for i in range(1, drafted + 1)),
        "too few": lambda rate, drafted: sum(rate**i for i in range(drafted)),
        "right to its end": lambda rate, drafted: 1 + drafted * rate**drafted,
    },
}
