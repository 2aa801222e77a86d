"""Decoders written as plain ``nn.Module``s: two in the style of models that transformers does not hold,
two on torch's own attention, and one that exists nowhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LAYERS = 64, 32, 4, 2


def causal(size: int, like: Tensor) -> Tensor:
    """``[size, size]``: minus infinity above the diagonal."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def halves_turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding, half-split: ``x [B, H, S, d]``, ``angles [S, d]``."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Decoder(nn.Module):
    """Embedding, blocks, norm, head; ``make(layer)`` builds a block that maps ``[B, S, width]`` to itself."""

    def __init__(
        self, make: Callable[[int], nn.Module], norm: Callable[[], nn.Module], tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(make(layer) for layer in range(LAYERS))
        self.norm = norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class TwoAxisBlock(nn.Module):
    """ChatGLM-6B's way: fused QKV interleaved per head, rotary over two axes, scaled residuals."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.heads, self.size, self.alpha = HEADS, WIDTH // HEADS, (2 * LAYERS) ** 0.5
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.scale = self.size**-0.5
        rates = 10000.0 ** -(torch.arange(0, self.size // 2, 2) / (self.size // 2))
        self.register_buffer("rates", rates, persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], device=x.device)
        along, across = x.chunk(2, dim=-1)
        turned = []
        for part, place in ((along, places), (across, places // 3)):
            angles = place[:, None] * self.rates
            turned.append(halves_turned(part, torch.cat([angles, angles], dim=-1).to(x.dtype)))
        return torch.cat(turned, dim=-1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.before(hidden)
        batch, length, _ = normed.shape
        mixed = self.query_key_value(normed).view(batch, length, self.heads, 3 * self.size).transpose(1, 2)
        query, key, value = mixed.split(self.size, dim=-1)
        scores = self.turned(query) @ self.turned(key).transpose(-1, -2) * self.scale
        weights = (scores + causal(length, hidden)).softmax(dim=-1)
        seen = (weights @ value).transpose(1, 2).reshape(batch, length, self.heads * self.size)
        hidden = normed * self.alpha + self.dense(seen)
        normed = self.between(hidden)
        return normed * self.alpha + self.down(F.gelu(self.up(normed)))


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class PackedBlock(nn.Module):
    """Baichuan's way: one ``W_pack`` for query, key and value one after another; gated MLP."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.first, self.second = RootMeanSquare(WIDTH), RootMeanSquare(WIDTH)
        self.W_pack = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.scale = self.head_dim**-0.5
        rates = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        self.register_buffer("inv_freq", rates, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        packed = self.W_pack(self.first(hidden))
        packed = packed.unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        query, key, value = (
            packed[k].view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for k in range(3)
        )
        angles = torch.arange(length, device=hidden.device)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1).to(hidden.dtype)
        query, key = halves_turned(query, angles), halves_turned(key, angles)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        hidden = hidden + self.o_proj(seen.transpose(1, 2).flatten(2))
        normed = self.second(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class TorchBlock(nn.Module):
    """nn.MultiheadAttention between residuals, its weights averaged over heads (the slow path)."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        mask = causal(hidden.shape[1], hidden)
        hidden = hidden + self.attention(normed, normed, normed, attn_mask=mask, need_weights=True)[0]
        return hidden + self.down(torch.relu(self.up(hidden)))


class EncoderBlock(nn.Module):
    """nn.TransformerEncoderLayer with a causal mask (torch's fused path at inference)."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.inside = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inside(hidden, src_mask=causal(hidden.shape[1], hidden))


class BraidBlock(nn.Module):
    """Exists nowhere. One projection braids, per KV head, ``q q q k v g g g``; keys and queries are
    normalised inside the forward, values are narrower than keys, scores are capped, and a gate that comes
    out of the same projection opens each query head. The MLP takes every third row of one matrix: two factors
    and a gate; its output returns through a narrow linear pair, scaled channel by channel."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.pairs, self.queries, self.keys, self.values = 2, 3, 6, 4
        self.braid = nn.Linear(WIDTH, self.pairs * (4 * self.keys + 4 * self.values))
        self.temper = nn.Parameter(torch.ones(self.keys))
        self.out = nn.Linear(self.pairs * self.queries * self.values, WIDTH, bias=False)
        self.threes = nn.Parameter(torch.randn(3 * 20, WIDTH))
        self.narrow, self.wide = nn.Linear(20, 10, bias=False), nn.Linear(10, WIDTH)
        self.size = nn.Parameter(torch.ones(WIDTH))

    def evened(self, x: Tensor) -> Tensor:
        return self.temper * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        strands = self.braid(hidden).view(batch, length, self.pairs, -1)
        sizes = [self.queries * self.keys, self.keys, self.values, self.queries * self.values]
        query, key, value, gate = strands.split(sizes, dim=-1)
        query = self.evened(query.unflatten(-1, (self.queries, self.keys)))
        scores = torch.einsum("bsphd,btpd->bphst", query, self.evened(key))
        weights = (5 * torch.tanh(scores / 5) + causal(length, hidden)).softmax(-1)
        seen = torch.einsum("bphst,btpe->bsphe", weights, value).flatten(3)
        hidden = hidden + self.out((seen * torch.sigmoid(gate)).flatten(2))
        rows = hidden @ self.threes.T
        product = rows[..., 0::3] * rows[..., 1::3] * torch.sigmoid(rows[..., 2::3])
        return hidden + self.size * self.wide(self.narrow(product))


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "in ChatGLM-6B's style": lambda: Decoder(TwoAxisBlock, lambda: nn.LayerNorm(WIDTH)),
    "in Baichuan's style": lambda: Decoder(PackedBlock, lambda: RootMeanSquare(WIDTH)),
    "nn.MultiheadAttention": lambda: Decoder(TorchBlock, lambda: nn.LayerNorm(WIDTH)),
    "nn.TransformerEncoderLayer": lambda: Decoder(EncoderBlock, lambda: nn.LayerNorm(WIDTH)),
    "invented (braid)": lambda: Decoder(BraidBlock, lambda: RootMeanSquare(WIDTH), tied=True),
}
