"""Scores of the default model."""

import pytest
import torch

from pruner_lib.assets import load_calibration, load_model
from pruner_lib.discovery import discover
from pruner_lib.importance import estimate_importance
from pruner_lib.pruning import plan_pruning


@pytest.mark.real_model
def test_bfloat16_ranks_like_float32_and_makes_the_papers_plan():
    model, tokenizer = load_model(dtype=torch.float32)
    dependencies = discover(model)
    batches = load_calibration(tokenizer, source="books", num_samples=4, seq_len=32, seed=0)
    names = [family.name for family in dependencies.select(("attention_head", "mlp_neuron"))]
    single = estimate_importance(model, dependencies, batches, families=names)
    half = estimate_importance(model.to(torch.bfloat16), dependencies, batches, families=names)
    neurons = [rho for name, rho in single.rank_correlation(half).per_family.items() if "mlp" in name]
    assert len(names) == 60 and min(neurons) > 0.99
    # Per layer: one of three KV heads, 2·3·64·576 + 2·64·576 weights, and 384 neurons of 3·576.
    plan = plan_pruning(dependencies, single, ratio=0.25, layers=range(4, 27))
    assert plan.num_params_removed == 23 * (8 * 64 * 576 + 384 * 3 * 576)
