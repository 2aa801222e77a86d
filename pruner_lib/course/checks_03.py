"""Checks of the exercises in notebook 03."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from pruner_lib.course.checking import passed, require, require_equal


def check_groups_kept(groups_kept: Callable[[Tensor, float], Sequence[int]]) -> None:
    """Exercise 3.1, on scores in no order and on ratios that round."""
    scores = torch.tensor([0.4, 0.1, 0.9, 0.2, 0.7, 0.3, 0.8, 0.6, 0.5, 1.0])
    for count, ratio in ((10, 0.3), (3, 0.25), (10, 0.25), (2, 0.9)):
        given = scores[:count]
        removed = min(int(ratio * count + 0.5), count - 1)
        order = given.argsort().tolist()
        halves_to_even = min(round(ratio * count), count - 1)
        require_equal(
            groups_kept(given.clone(), ratio),
            sorted(order[removed:]),
            asked=f"groups_kept(tensor of {count} scores, {ratio})",
            mistakes={
                "Halves are rounded upwards here.": sorted(order[halves_to_even:]),
                "Those are the groups that go.": sorted(order[:removed]),
                "The lowest scores go; here the highest went.": sorted(order[: count - removed]),
                "The groups are right; sort them by their numbers, not by their scores.": order[removed:],
                "No group is left; one always stays.": [],
                f"{ratio} of {count} groups are {ratio * count:g}: that rounds to {removed}.": sorted(
                    order[int(ratio * count) :]
                ),
            },
            hint=f"The scores are {[round(score, 1) for score in given.tolist()]}.",
            tolerance=0,
        )
    passed("3.1", "plan_pruning does this for every family.")


def check_llama_params(llama_params: Callable[..., float]) -> None:
    """Exercise 3.2, against the paper's table and its own arithmetic."""
    llama = (4096, 32, 11008, 32, 32000)
    dense, pruned, halved = 6_738_415_616, 5_422_977_024, 3_350_188_032
    head, neurons, norms = 4096 * 32000, 26 * 3 * 4096 * 2752, 65 * 4096
    attention = 26 * 4 * 4096 * 1024
    for name, layers, ratio, expected in (
        ("dense", 0, 0.25, dense),
        ("20 %", 26, 0.25, pruned),
        ("50 %", 28, 0.6, halved),
    ):
        mistakes = {
            "One of embedding and output head is missing; LLaMA has both.": expected - head,
            "The norms are missing: two a layer and one at the end.": expected - norms,
            "The last norm is missing.": expected - 4096,
        }
        if name == "20 %":
            mistakes |= {
                "Heads are not pruned yet.": expected + attention,
                "Neurons are not pruned yet.": expected + neurons,
                "Every layer was pruned; only `pruned_layers` of them are.": dense
                - (attention + neurons) * 32 // 26,
                "That is what is removed, not what is left.": dense - expected,
            }
        found = llama_params(*llama, layers, ratio)
        require_equal(
            found,
            expected,
            asked=f"llama_params{(*llama, layers, ratio)}, LLaMA-7B {name}",
            mistakes=mistakes,
            hint=f"Off by a factor of {_factor(found, expected)}.",
            tolerance=1e-9,
        )
    passed("3.2", "5,422,977,024, which the paper prints as 5.42 B.")


def _factor(found: object, expected: int) -> str:
    return f"{found / expected:.4f}" if isinstance(found, int | float) else "what is no number"


def check_cut_mlp(cut_mlp: Callable[..., Sequence[Tensor]]) -> None:
    """Exercise 3.3: the cut MLP computes what the zeroed one does."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(6, 4, generator=generator) for _ in range(2))
    down, x = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
    keep = [3, 0, 2]
    found = cut_mlp(gate.clone(), up.clone(), down.clone(), keep)
    require(
        isinstance(found, tuple | list) and len(found) == 3,
        f"cut_mlp must return three matrices; it returned {type(found).__name__}.",
    )
    for name, part, shape in zip(("gate", "up", "down"), found, ((3, 4), (3, 4), (4, 3)), strict=True):
        require(
            tuple(part.shape) == shape,
            f"{name} has shape {tuple(part.shape)} after the cut, expected {shape}. A neuron is a row of "
            "gate and up and a column of down.",
        )
    small_gate, small_up, small_down = found
    hidden = silu(x @ gate.T) * (x @ up.T)
    zeroed = torch.zeros_like(hidden)
    zeroed[:, keep] = hidden[:, keep]
    require(
        torch.allclose(
            (silu(x @ small_gate.T) * (x @ small_up.T)) @ small_down.T, zeroed @ down.T, atol=1e-5
        ),
        "The shapes are right, but the MLP computes something else than the one with the others zeroed. "
        f"All three matrices must keep the same neurons in the same order; keep is {keep}.",
    )
    passed("3.3", "cut equals zeroed.")
