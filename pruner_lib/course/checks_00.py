"""Checks of the exercises in notebook 00."""

from __future__ import annotations

from collections.abc import Callable

from pruner_lib.course.checking import passed, require_equal
from pruner_lib.course.toys import tiny_llama
from pruner_lib.discovery import discover
from pruner_lib.pruning import PruningPlan


def check_freed_params(freed_params: Callable[[int, int, int], int]) -> None:
    """Exercise 0.1, against a plan for a small Llama and the numbers of notebook 00."""
    dependencies = discover(tiny_llama(layers=3))
    removal = {f"layers.{layer}.mlp_neuron": range(5) for layer in (0, 2)}
    planned = PruningPlan.from_removal(dependencies, removal).num_params_removed
    for hidden, neurons, layers, expected in ((32, 5, 2, planned), (576, 384, 23, 15_261_696)):
        require_equal(
            freed_params(hidden, neurons, layers),
            expected,
            asked=f"freed_params({hidden}, {neurons}, {layers})",
            mistakes={
                "A gated MLP has three matrices; one of them is left out.": expected * 2 // 3,
                "Every pruned layer loses so many neurons, not one layer alone.": expected // layers,
                "A neuron is one row or column of each matrix, not the whole matrix.": expected * hidden,
                "Count the weights of a row or column, not only the rows and columns.": expected // hidden,
            },
            hint="Look at the drawing of one group: how many matrices, and how long is each coloured line?",
            tolerance=0,
        )
    passed("0.1", "a plan counts parameters before anything is cut, and so can you.")
