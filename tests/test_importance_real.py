"""Scores of the default model."""

import pytest
import torch
from importance_oracle import first_order

from pruner_lib.assets import PAPER_CALIBRATION, load_calibration, load_model
from pruner_lib.discovery import discover
from pruner_lib.importance.scores import spearman
from pruner_lib.pruning import plan_pruning


@pytest.fixture(scope="module")
def scored():
    """Model, dependencies, the paper's batches, and first-order scores of heads and neurons."""
    model, tokenizer = load_model(device="cpu", dtype=torch.float32)
    dependencies = discover(model)
    batches = load_calibration(tokenizer, **PAPER_CALIBRATION, seed=0)
    names = [family.name for family in dependencies.select(("attention_head", "mlp_neuron"))]
    scores = first_order(model, dependencies, batches, families=names, source="books", seed=0)
    return model, dependencies, batches, scores


@pytest.mark.real_model
def test_bfloat16_ranks_like_float32(scored):
    _, dependencies, batches, single = scored
    model, _ = load_model(device="cpu", dtype=torch.float32)
    tokens, names = batches[:4, :32], list(single)  # few: a CPU without bfloat16 units is slow at it
    single = first_order(model, dependencies, tokens, families=names)
    half = first_order(model.to(torch.bfloat16), dependencies, tokens, families=names)
    found = single.rank_correlation(half)
    neurons = [rho for name, rho in found.per_family.items() if "mlp" in name]
    heads = [torch.cat([s[name] for name in single if "head" in name]) for s in (single, half)]
    assert len(neurons) == 30 and min(neurons) >= 0.99
    assert spearman(*heads) >= 0.99  # a layer has three heads only, so those of all layers together


@pytest.mark.real_model
def test_the_papers_plan(scored):
    _, dependencies, _, single = scored
    # Per layer: one of three KV heads, 2·3·64·576 + 2·64·576 weights, and 384 neurons of 3·576.
    plan = plan_pruning(dependencies, single, ratio=0.25, layers=range(4, 27))
    assert plan.num_params_removed == 23 * (8 * 64 * 576 + 384 * 3 * 576)


@pytest.mark.real_model
def test_layer_by_layer_is_the_one_pass_on_the_default_model(scored):
    model, dependencies, batches, single = scored
    names = [name for name in single if name.startswith(("layers.26.", "layers.28."))]
    options = {"micro_batch_size": 5, "accumulate": "layers", "families": names}
    layered = first_order(model, dependencies, batches, **options)
    for name in names:
        torch.testing.assert_close(layered[name], single[name], rtol=1e-3, atol=0)
