"""Checks of the exercises in notebook 06."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pruner_lib.course.checking import passed, require, require_equal
from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.pruning import PruningPlan, prune


class _Block(nn.Module):
    """Three heads of four channels, each multiplied with a constant of its own; a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.values, self.out = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((8, 10), (8, 10), (10, 8)))

    def gains(self) -> Tensor:
        made: Tensor = getattr(self, "kept", None)  # type: ignore[assignment]
        return 1.0 + torch.arange(self.heads, device=self.out.weight.device) if made is None else made

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.values(hidden).unflatten(-1, (self.heads, -1)) * self.gains()[:, None]
        hidden = hidden + self.out(heads.flatten(-2))
        return hidden + self.down(torch.sigmoid(self.gate(hidden)) * self.up(hidden))


class _Output:
    """What the library reads of a model's output."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.blocks = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return _Output(self.head(hidden))


def _free_toy() -> _Toy:
    """The toy with its constants as buffers, so that every family may be cut."""
    toy = _Toy()
    for block in toy.blocks:
        block.register_buffer("kept", block.gains())  # type: ignore[operator]
    return toy


def check_keep_gains(keep_gains: Callable[[nn.Module, Tensor], None]) -> None:
    """Exercise 6.1, on a toy whose heads are blocked until the constants are part of the model."""
    toy = _Toy()
    trained = sum(p.numel() for p in toy.parameters() if p.requires_grad)
    for block in toy.blocks:
        keep_gains(block, block.gains())  # type: ignore[operator]
    for block in toy.blocks:
        found = getattr(block, "kept", None)
        require(isinstance(found, Tensor), f"module.kept must be a tensor of 3 numbers; it is {found!r}")
        assert isinstance(found, Tensor)
        require_equal(found, [1.0, 2.0, 3.0], asked="keep_gains(module, tensor([1, 2, 3])); module.kept")
    require(
        "blocks.0.kept" in toy.state_dict(),
        "kept is not in the state dict: saved and loaded, the model would forget which gains are left. "
        "An ordinary attribute and a buffer with persistent=False are constants.",
    )
    heads = [f for f in discover(toy).families if any("kept" in piece.parameter for piece in f.slices)]
    require(
        len(heads) == 2 and all(f.cuttable for f in heads),
        f"the heads are still blocked: {[f.blocked for f in discover(toy).families if f.size == 3]}",
    )
    now = sum(p.numel() for p in toy.parameters() if p.requires_grad)
    require(
        now == trained,
        f"{now - trained} numbers more would be trained: a Parameter frees the heads too, but these are "
        "constants. What is saved and not trained?",
    )
    passed("6.1", "a saved buffer is cut with its heads and stays constant.")


def check_group_params(group_params: Callable[[GroupFamily], int]) -> None:
    """Exercise 6.2, on every family of the toy that may be cut."""
    dependencies = discover(_free_toy())
    for family in dependencies.select():
        pieces = [(piece.shape, piece.dim, piece.index.shape[1]) for piece in family.slices]
        one = [prod(shape) // shape[dim] for shape, dim, _ in pieces]
        require_equal(
            group_params(family),
            sum(k * others for (*_, k), others in zip(pieces, one, strict=True)),
            asked=f"group_params of {family.name}",
            mistakes={
                "A group may own several indices of a slice: index.shape[1] of them.": sum(one),
                "That counts indices; each is a whole row or column.": sum(k for *_, k in pieces),
                "That is all groups together.": sum(
                    k * others * family.size for (*_, k), others in zip(pieces, one, strict=True)
                ),
            },
            hint=f"Its slices are {[(piece.parameter, piece.shape, piece.dim) for piece in family.slices]}.",
        )
    passed("6.2", "indices in the slice times the size of all other dimensions, over all slices.")


CutError = Callable[[nn.Module, DependencyMap, Mapping[str, Sequence[int]], Tensor], float]


def check_cut_error(cut_error: CutError) -> None:
    """Exercise 6.3, on a right map and on one that pairs the wrong slices."""
    toy, ids = _free_toy(), torch.arange(12).view(2, 6)
    dependencies = discover(toy)
    removal = {f.name: [1] for f in dependencies.select(layers=(0, 1))}
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    found = cut_error(toy, dependencies, removal, ids)
    require(found is not None, "got None. Does the function end in `return`?")
    require(
        all(torch.equal(tensor, before[name]) for name, tensor in toy.state_dict().items()),
        "the given model was changed; prune and zero both return a new one",
    )
    require(
        abs(float(found)) < 1e-4,
        f"a right cut gave {float(found):.3g}, where rounding alone would be below 1e-4. Was the cut model "
        "compared with the dense one instead of the zeroed one?",
    )
    _require_it_notices(cut_error, toy, dependencies, removal, ids)
    passed("6.3", "a right cut is at rounding, a wrong one is not.")


def _require_it_notices(
    cut_error: CutError,
    toy: nn.Module,
    dependencies: DependencyMap,
    removal: Mapping[str, Sequence[int]],
    ids: Tensor,
) -> None:
    """An oracle that zeroes other groups than are cut stands for a wrong map."""
    other = {name: [2] for name in removal}

    class _Wrong(DependencyMap):
        def zero(self, model: nn.Module, removal: Any) -> nn.Module:
            return super().zero(model, other)

    wrong = _Wrong(**{name: getattr(dependencies, name) for name in dependencies.__dataclass_fields__})
    with torch.no_grad():
        expected = wrong.zero(toy, removal)(input_ids=ids).logits
        apart = prune(toy, PruningPlan.from_removal(wrong, removal))(input_ids=ids).logits - expected
    require_equal(
        cut_error(toy, wrong, removal, ids),
        float(apart.abs().max() / expected.abs().max()),
        asked="cut_error where other groups are zeroed than are cut",
        mistakes={
            "Differences have signs: take the absolute value before the maximum.": float(
                apart.max() / expected.abs().max()
            ),
            "Divide by the largest logit of the zeroed model.": float(apart.abs().max()),
            "That is the mean; one wrong logit among many must show.": float(
                apart.abs().mean() / expected.abs().max()
            ),
        },
        hint="The largest |cut - zeroed| over the largest |zeroed|.",
        tolerance=1e-3,
    )
