"""Wrong answers to the exercises of notebook 04."""

from torch.nn.functional import kl_div, log_softmax, softmax


def divergence(student, teacher, temperature, *, reduction="batchmean"):
    return kl_div(
        log_softmax(student / temperature, -1), softmax(teacher / temperature, -1), reduction=reduction
    )


def in_place(weight, down, up, alpha, rank):
    weight += alpha / rank * up @ down
    return weight


WRONG = {
    "4.2": {
        "not by α": lambda w, a, b, alpha, rank: w + alpha * b @ a,
        "is not scaled": lambda w, a, b, alpha, rank: w + b @ a,
        "add it to W": lambda w, a, b, alpha, rank: alpha / rank * b @ a,
        "given weight was changed": in_place,
        "shape of W": lambda w, a, b, alpha, rank: a @ w.T,
    },
    "4.1": {
        "not to be learnt": lambda prompt, response, end: ([*prompt, *response, end],) * 2,
        "never learns to stop": lambda p, r, end: ([*p, *r], [-100] * len(p) + r),
        "end token is to be learnt": lambda p, r, end: ([*p, *r, end], [-100] * len(p) + [*r, -100]),
        "shifts them by one": lambda p, r, end: ([*p, *r, end], [-100] * (len(p) - 1) + [*r, end, -100]),
        "must return two lists": lambda p, r, end: [*p, *r, end],
    },
    "4.3": {
        "T² is missing": divergence,
        "from the student to the teacher": lambda s, t, heat: heat**2 * divergence(t, s, heat),
        "divided by T": lambda s, t, heat: heat**2 * divergence(s, t, 1.0),
        "not their sum": lambda s, t, heat: heat**2 * divergence(s, t, heat, reduction="sum"),
        "over the vocabulary": lambda s, t, heat: heat**2 * divergence(s, t, heat) / s.shape[-1],
        "log p": lambda s, t, heat: ((s - t) ** 2).mean(),
    },
}
