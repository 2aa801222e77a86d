"""Recovery of the default model, small: its own chat template, packing, a teacher, a cut that comes back."""

import pytest
import torch

from pruner_lib import PruningPlan, discover, load_calibration, perplexity, prune
from pruner_lib.recovery import Distillation, RecoverySettings, format_chat, recover
from pruner_lib.recovery.packing import keeps_apart
from pruner_lib.recovery.self_generated import SelfGeneration, generate_instructions

pytestmark = pytest.mark.real_model


def test_the_models_own_chat_template_token_by_token(default_model):
    _, tokenizer = default_model
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
    example = format_chat(tokenizer, turns, seq_len=128)
    learnt = example.labels != -100
    assert tokenizer.decode(example.input_ids[learnt]) == "Blue.<|im_end|>\n"
    masked = tokenizer.decode(example.input_ids[~learnt])
    assert masked.endswith("<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n")
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert example.input_ids.tolist() == list(whole)


def test_packed_examples_do_not_see_each_other(default_model):
    model, tokenizer = default_model
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
    assert keeps_apart(model, [format_chat(tokenizer, turns, seq_len=64)] * 2)


def test_a_cut_model_comes_back_towards_its_teacher(default_model):
    """Every eighth neuron of each layer gone, then ten small steps on novels; measured on other text."""
    model, tokenizer = default_model
    dependencies = discover(model)
    removal = {family.name: range(0, family.size, 8) for family in dependencies.select(kind="mlp_neuron")}
    pruned = prune(model, PruningPlan.from_removal(dependencies, removal))
    text = load_calibration(tokenizer, source="c4", num_samples=8, seq_len=64, seed=1)
    settings = RecoverySettings(
        max_steps=10, batch_size=4, micro_batch=4, seq_len=64, learning_rate=1e-3, warmup_steps=2,
        distillation=Distillation(weight=1.0),
    )  # fmt: skip
    data = load_calibration(tokenizer, source="books", num_samples=40, seq_len=64, seed=0)
    result = recover(pruned, None, data, settings=settings, teacher=model, progress=False)
    dense, before, after = (
        float(perplexity(m, tokenizer, text, seq_len=64)) for m in (model, pruned, result.model)
    )
    away = [record["divergence"] for record in result.history]
    assert sum(away[5:]) < 0.95 * sum(away[:5])  # every step sees other text, so single steps jump
    assert dense < after < dense + 0.7 * (before - dense)


def test_the_model_writes_answers_that_can_be_learnt(default_model, tmp_path):
    model, tokenizer = default_model
    settings = SelfGeneration(num_examples=3, batch_size=4, max_new_tokens=40)
    rows = generate_instructions(model, tokenizer, tmp_path / "a.jsonl", settings=settings, progress=False)
    assert len({row["output"] for row in rows}) == 3
    assert all(row["output"][-1] in ".!?\"')`:" or len(row["output"]) >= 12 for row in rows)
    assert all(torch.tensor(tokenizer(row["output"])["input_ids"]).numel() > 3 for row in rows)
