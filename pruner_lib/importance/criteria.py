"""Criteria and reductions: one line of mathematics each, in one place.

A criterion is a function whose argument names say what it reads; nothing else is collected:

    W   a parameter
    g   ∂L/∂W, with L the mean token cross-entropy over all N calibration sequences
    h   (1/N) Σ_j g_j², with g_j the gradient of sequence j alone (the Fisher information's diagonal)
    r   root mean square of each input of W over all tokens, ‖x‖₂ / √tokens
    m   mean |x| of each input
    v   variance of each input, E[x²] − E[x]²

All have the shape of W (an input's r, m and v are repeated along the outputs). The score of one index
of a dimension is the sum over the other dimensions. To add a criterion, write the line and give it in
place of a name, or add it to the table below::

    cubic = Criterion("l3", "Σ |W|³", lambda W: W.abs() ** 3)
    estimate_importance(model, dependencies, None, criterion=cubic)

    spread = Criterion("spread", "Σ |W|·σ(x)", lambda W, v: W.abs() * v.sqrt())      # forward passes only
    saliency = Criterion("gradient", "Σ |g|", lambda g: g.abs())                     # backward passes too

What is an input: of a matrix, what it multiplies; of an embedding, the one-hot token, so that r² and m
are the token's frequency. A vector counts as fed by the constant 1, which is exact for a bias and the
mean over the channels for a norm's weight. A matrix that is looked up and multiplied (tied embeddings) adds
up both uses; of uses in the same way, as of a weight that layers share, the tokens are counted together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

GRADIENTS = ("g", "h")
INPUTS = ("r", "m", "v")
READABLE = ("W", *GRADIENTS, *INPUTS)
SCOPES = ("element", "vector", "channel", "group")


@dataclass(frozen=True)
class Criterion:
    """How one weight, vector or group gets its score.

    Attributes:
        name: as given to ``estimate_importance``.
        equation: the score of one index of one parameter, in the letters of the module docstring.
        score: the elements' scores from any of W, g, h, r, m, v (its argument names); None draws one
            random number per group.
        source: where it comes from.
        scope: ``"element"``, absolute values are the function's own; ``"vector"``, the absolute value
            is taken after the sum over an index; ``"channel"``, the function scores input channels
            (from r, m, v alone), a slice that reads no input takes no part and a group takes the
            mean over its channels; ``"group"``, the random draw.

    Raises:
        ValueError: an argument name that stands for nothing, or an unknown scope.
    """

    name: str
    equation: str
    score: Callable[..., Tensor] | None
    source: str = ""
    scope: str = "element"

    def __post_init__(self) -> None:
        if self.score is None:
            object.__setattr__(self, "scope", "group")
        if self.scope not in SCOPES:
            raise ValueError(f"{self.name}: unknown scope {self.scope!r}; valid are {', '.join(SCOPES)}")
        valid = INPUTS if self.scope == "channel" else READABLE
        unknown = [name for name in self.reads if name not in valid]
        if unknown:
            raise ValueError(
                f"criterion {self.name!r} reads {', '.join(unknown)}, which stands for nothing; the "
                f"arguments of a {self.scope} score may be {', '.join(valid)}"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the function's arguments."""
        return () if self.score is None else tuple(inspect.signature(self.score).parameters)

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads g."""
        return "g" in self.reads

    @property
    def needs_second_moment(self) -> bool:
        """Whether it reads h, which takes one backward pass per sequence."""
        return "h" in self.reads

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads r, m or v, which takes a forward pass."""
        return any(name in INPUTS for name in self.reads)

    @property
    def needs_batches(self) -> bool:
        """Whether it reads anything but the weights."""
        return any(name != "W" for name in self.reads)


# The first seven as LLM-Pruner's code has them (section 3.2 of the paper, and its repository). What a
# function has made itself it goes on with in place (abs_, mul_): on a CPU, fresh memory for every
# operation costs more than the arithmetic.
_PAPER = "LLM-Pruner, arXiv 2305.11627"
_BUILT_IN = (
    Criterion("random", "uniform, one draw per group", None, _PAPER),
    Criterion("l1", "Σ |W|", lambda W: W.abs(), _PAPER),
    Criterion("l2", "Σ W² (no root)", lambda W: W**2, _PAPER),
    Criterion("taylor_vector", "|Σ W·g|", lambda W, g: W * g, _PAPER, "vector"),
    Criterion("taylor_first", "Σ |W·g|", lambda W, g: (W * g).abs_(), _PAPER),
    Criterion("taylor_second", "Σ |W²·h|", lambda W, h: W.square().mul_(h).abs_(), _PAPER),
    Criterion("taylor_mixed", "Σ |W·g − ½ W²·h|", lambda W, g, h: (W * g - 0.5 * W**2 * h).abs(), _PAPER),
    Criterion("wanda", "Σ |W|·r", lambda W, r: W.abs().mul_(r), "Wanda, arXiv 2306.11695"),
    Criterion("fluctuation", "Σ W²·v", lambda W, v: W.square().mul_(v), "FLAP, arXiv 2312.11983"),
    Criterion("activation", "m", lambda m: m, "Minitron, arXiv 2407.14679", "channel"),
)
CRITERIA = MappingProxyType({criterion.name: criterion for criterion in _BUILT_IN})

Reduction = Callable[[Tensor], Tensor]


def _product(slices: Tensor) -> Tensor:
    found = slices.double().prod(0)
    vanished = (found == 0) & (slices != 0).all(0)
    if bool(vanished.any()):
        raise ValueError(
            f"the product of {len(slices)} slices is below the smallest number there is for "
            f"{int(vanished.sum())} of {len(vanished)} groups, so they could not be told apart; use another "
            'reduction for this family, "sum" or "mean"'
        )
    return found


# [slices, size] to [size]; "last" is the structure that reads the group last (o_proj, down_proj).
REDUCTIONS: MappingProxyType[str, Reduction] = MappingProxyType(
    {
        "sum": lambda slices: slices.sum(0),
        "product": _product,
        "max": lambda slices: slices.amax(0),
        "last": lambda slices: slices[-1],
        "mean": lambda slices: slices.mean(0),
    }
)


def get_criterion(name: str | Criterion) -> Criterion:
    """The criterion of that name; a :class:`Criterion` is its own.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if isinstance(name, Criterion):
        return name
    if name not in CRITERIA:
        valid = ", ".join(CRITERIA)
        raise ValueError(f"unknown criterion {name!r}; valid are {valid}, or a Criterion of your own")
    return CRITERIA[name]


def get_reduction(name: str) -> Reduction:
    """The reduction of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"unknown reduction {name!r}; valid are {', '.join(REDUCTIONS)}")
    return REDUCTIONS[name]
