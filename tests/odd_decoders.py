"""Decoders that exist nowhere: what a rule for a known architecture would get wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, SIZE, VOCABULARY = 12, 3, 4, 17


class Odd(nn.Module):
    """An embedding, two layers ``x + f(x)`` and a head; a subclass says ``f`` and its weights."""

    layers_shared = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        first = self.layer()
        self.layers = nn.ModuleList([first, first if self.layers_shared else self.layer()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def layer(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, H, S, d]`` each; the scale is a number of its own."""
    scores = q @ k.transpose(-1, -2) * 0.5
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


class Attention(nn.Module):
    """Query, key, value and output; what is odd is in the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x))))


class TiedQueryKey(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(attend(heads(self.q(x)), heads(self.q(x)), heads(self.v(x))))


class GatedHeads(Attention):
    """One learned gate per head, computed from the token, and one fixed number per head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.temperature = nn.Linear(WIDTH, HEADS), nn.Parameter(torch.ones(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = heads(self.q(x)) * self.temperature[:, None, None]
        mixed = attend(q, heads(self.k(x)), heads(self.v(x))).unflatten(-1, (-1, SIZE))
        return self.o((mixed * self.gate(x).sigmoid().unsqueeze(-1)).flatten(2))


class PairedKeyValue(Attention):
    """Key and value in one matrix, head by head: k₀ v₀ k₁ v₁ …"""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(WIDTH, 2 * HEADS * SIZE)
        del self.k, self.v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(x).unflatten(-1, (-1, 2 * SIZE)).transpose(1, 2).split(SIZE, -1)
        return self.o(attend(heads(self.q(x)), k, v))


class LearnedSlopes(Attention):
    """ALiBi whose slopes are learned: heads are free, unlike with slopes that the code computes."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.slopes[:, None, None] * (places[None] - places[:, None])
        return self.o(attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), bias))


class ComputedSlopes(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=x.device)
        bias = slopes[:, None, None] * (places[None] - places[:, None])
        return self.o(attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), bias))


class TalkingHeads(Attention):
    """Scores are mixed across heads by a learned matrix, after the product."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = heads(self.q(x)) @ heads(self.k(x)).transpose(-1, -2) * 0.5
        scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.o((scores.softmax(-1) @ heads(self.v(x))).transpose(1, 2).flatten(2))


class Neurons(nn.Module):
    """Two matrices and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return F.relu(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


class OverTheirNorm(Neurons):
    """The order of the norm, 1, is no dimension."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return F.relu(h) / (torch.linalg.vector_norm(h, 1, dim=-1).unsqueeze(-1) + 1)


class OverTheirLargest(Neurons):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h / (1 + h.abs().amax(dim=(-1,), keepdim=True))


class OverTheLargestToken(Neurons):
    """Extremes along the sequence leave the neurons free."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h / (1 + h.abs().amax(dim=(1,), keepdim=True))


class OverTheLargestOfAll(Neurons):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h / (1 + h.abs().max())


class Shifted(Neurons):
    """Each token's neurons also see those of the token before: a convolution in time, written with slices."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.ones(2, 10))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return F.silu(h * self.taps[0] + before * self.taps[1])


class Convolved(Neurons):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(10, 10, 2, groups=10, padding=1)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return F.silu(self.conv(h.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2))


class Reversed(Neurons):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return F.relu(h) * h.flip(-1)


class Halved(Neurons):
    """The first half gates the second."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(5, WIDTH)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        gate, value = h.chunk(2, -1)
        return gate.sigmoid() * value


class Recurrent(Neurons):
    """A linear recurrence over the tokens with one learned decay per neuron, step by step as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.ones(10))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        state, steps = torch.zeros_like(h[:, 0]), []
        for step in h.unbind(1):
            state = state * self.decay.sigmoid() + step
            steps.append(state)
        return torch.stack(steps, 1)


LAYERS: dict[str, type[nn.Module]] = {
    made.__name__: made
    for made in (
        *(Attention, TiedQueryKey, GatedHeads, PairedKeyValue, LearnedSlopes, ComputedSlopes, TalkingHeads),
        *(Neurons, OverTheirNorm, OverTheirLargest, OverTheLargestToken, OverTheLargestOfAll),
        *(Shifted, Convolved, Reversed, Halved, Recurrent),
    )
}


def odd(name: str, *, shared: bool = False) -> nn.Module:
    """A random float64 decoder of two such layers; ``shared``: one layer used twice."""
    torch.manual_seed(0)
    made = type(name, (Odd,), {"layer": lambda self: LAYERS[name](), "layers_shared": shared})()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return made.double().eval()
