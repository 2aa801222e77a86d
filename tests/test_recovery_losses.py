"""The loss against torch's own autograd, and distillation from teachers in memory and on disk."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_models import QUICK, VOCABULARY, counting, same, snapshot, tiny_gpt2, tiny_llama
from torch.nn import functional

from pruner_lib.recovery import (
    Distillation,
    RecoveryError,
    RecoverySettings,
    losses,
    precompute_teacher,
    recover,
)
from pruner_lib.recovery.losses import DenseTargets, TopTargets, token_losses
from pruner_lib.recovery.training import hidden_distance


def plain(logits, labels, teacher, weight, temperature):
    """The formula of the docstring, by autograd."""
    kept = labels[:, 1:] != -100
    student = logits[:, :-1][kept]
    hard = functional.cross_entropy(student, labels[:, 1:][kept], reduction="sum")
    log_q = functional.log_softmax(student / temperature, -1)
    p = functional.softmax(teacher[:, :-1][kept] / temperature, -1)
    soft = (p * (p.log() - log_q)).sum()
    return (1 - weight) * hard + weight * temperature**2 * soft


def case(seed=0, rows=2, length=100, size=11):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (
        3 * torch.randn(rows, length, size, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, size, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return logits, teacher, labels


def dense(teacher, temperature):
    flat = teacher.flatten(0, 1) / temperature
    return lambda index: DenseTargets(flat[index])


def top(teacher, temperature, k):
    values, ids = torch.log_softmax(teacher.flatten(0, 1) / temperature, -1).topk(k)
    return lambda index: TopTargets(ids[index], values[index])


@settings(max_examples=12, deadline=None)
@given(weight=st.floats(0, 1), temperature=st.floats(0.5, 4), whole=st.booleans(), seed=st.integers(0, 9))
def test_loss_and_gradient_are_those_of_the_formula(weight, temperature, whole, seed):
    """Also by a teacher known by its k likeliest tokens, when k is the vocabulary."""
    logits, teacher, labels = case(seed)
    mine, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    soft = dense(teacher, temperature) if whole else top(teacher, temperature, 11)
    with patch.object(losses, "_CPU_LOGITS", 11 * 30):  # several chunks, the last one shorter
        found = token_losses(mine, labels, soft=soft, weight=weight, temperature=temperature)
    expected = plain(theirs, labels, teacher, weight, temperature)
    (found.total * 0.7).backward()
    (expected * 0.7).backward()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert found.count == int((labels[:, 1:] != -100).sum())


def test_without_a_teacher_it_is_cross_entropy():
    logits, _, labels = case()
    mine, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    found = token_losses(mine, labels)
    expected = functional.cross_entropy(
        theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    found.total.backward()
    expected.backward()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert found.cross_entropy == pytest.approx(float(expected.detach()))
    assert found.divergence == 0


def test_a_truncated_teacher_counts_the_rest_as_one_outcome():
    """Gradient by autograd of the divergence over k + 1 outcomes; never above the whole divergence."""
    logits, teacher, labels = case()
    kept = labels[:, 1:] != -100
    mine, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    found = token_losses(mine, labels, soft=top(teacher, 1.5, 3), weight=1.0, temperature=1.5)
    q = functional.softmax(theirs[:, :-1][kept] / 1.5, -1)
    p, ids = functional.softmax(teacher[:, :-1][kept] / 1.5, -1).topk(3)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    picked = q.gather(1, ids)
    q = torch.cat([picked, 1 - picked.sum(-1, keepdim=True)], -1)
    expected = 1.5**2 * (p * (p / q).log()).sum()
    found.total.backward()
    expected.backward()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    whole = token_losses(logits, labels, soft=dense(teacher, 1.5), weight=1.0, temperature=1.5)
    assert found.divergence < whole.divergence


def test_no_more_than_a_few_tokens_are_held_in_float32(monkeypatch):
    """The largest float32 tensor the loss makes is a chunk, not the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(losses, "_CPU_LOGITS", 50 * 97)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    logits = torch.randn(4, 256, 97).bfloat16().requires_grad_(True)
    teacher = torch.randn(4 * 256, 97)
    labels = torch.randint(0, 97, (4, 256))
    with Watch():
        found = token_losses(
            logits, labels, soft=lambda index: DenseTargets(teacher[index]), weight=0.5, temperature=2.0
        )
        found.total.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert max(sizes) == 50 * 97


def test_hidden_distance_is_relative_and_maps_layers():
    labels = torch.tensor([[-100, 5, -100]])
    teacher = [torch.full((1, 3, 4), value) for value in (1.0, 2.0, 3.0, 4.0)]
    student = [torch.full((1, 3, 4), value) for value in (2.0, 2.0)]
    # Layers 1 and 2 of 2 stand against 2 and 4 of 4: (2 - 2)² / 2² and (2 - 4)² / 4², one predicting token.
    assert float(hidden_distance(student, teacher, labels)) == pytest.approx((0 + 0.25) / 2)


def far_apart():
    student = tiny_llama(seed=3)
    return student, tiny_llama()


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_distillation_brings_the_student_to_the_teacher(weight):
    student, teacher = far_apart()
    before = snapshot(teacher)
    chosen = RecoverySettings(
        **{**QUICK, "max_steps": 60, "learning_rate": 5e-3}, method="full", target="all",
        distillation=Distillation(weight=weight, temperature=2.0),
    )  # fmt: skip
    result = recover(student, None, counting(), settings=chosen, teacher=teacher, progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.6 * first["loss"]
    if weight == 1:
        assert last["divergence"] < 0.4 * first["divergence"]
    mixed = (1 - weight) * first["cross_entropy"] + weight * 4 * first["divergence"]
    assert first["loss"] == pytest.approx(mixed, rel=1e-5)
    assert same(snapshot(teacher), before)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_teacher_of_itself_has_nothing_to_teach():
    model = tiny_llama()
    result = recover(
        model, None, counting(), settings=RecoverySettings(**QUICK), teacher=model, progress=False
    )
    assert result.history[0]["divergence"] == pytest.approx(0, abs=1e-6)
    after = snapshot(result.model)
    for name, value in snapshot(model).items():
        torch.testing.assert_close(after[name], value, atol=5e-2, rtol=0)


def test_hidden_states_are_learnt_too():
    student, teacher = far_apart()
    chosen = RecoverySettings(
        **{**QUICK, "max_steps": 20},
        method="full",
        target="all",
        distillation=Distillation(hidden_weight=1.0),
    )
    result = recover(student, None, counting(), settings=chosen, teacher=teacher, progress=False)
    assert result.history[-1]["hidden_distance"] < 0.7 * result.history[0]["hidden_distance"]


def test_precomputed_logits_of_the_whole_vocabulary_give_the_same_run(tmp_path):
    student, teacher = far_apart()
    chosen = RecoverySettings(**QUICK, distillation=Distillation(temperature=2.0))
    data = counting(rows=7)
    file = precompute_teacher(
        teacher, None, data, tmp_path / "t.safetensors", settings=chosen, top_k=VOCABULARY
    )
    live, read = (
        recover(student, None, data, settings=chosen, teacher=t, progress=False)
        for t in (teacher, tmp_path / "t.safetensors")
    )
    assert read.losses == pytest.approx(live.losses, rel=1e-5)
    assert file.top_k == VOCABULARY
    few = precompute_teacher(teacher, None, data, tmp_path / "t.safetensors", settings=chosen, top_k=8)
    part = recover(student, None, data, settings=chosen, teacher=few, progress=False)
    assert part.losses[0] < live.losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_precomputed_teacher_of_other_data_or_temperature_is_refused(tmp_path):
    student, teacher = far_apart()
    chosen = RecoverySettings(**QUICK)
    file = precompute_teacher(teacher, None, counting(), tmp_path / "t", settings=chosen, top_k=4)
    warm = RecoverySettings(**QUICK, distillation=Distillation(temperature=2.0))
    hidden = RecoverySettings(**QUICK, distillation=Distillation(hidden_weight=1.0))
    for data, given_settings, message in (
        (counting(rows=9), chosen, "other examples"),
        (counting(), warm, "temperature 1"),
        (counting(), hidden, "no hidden states"),
    ):
        with pytest.raises(RecoveryError, match=message):
            recover(student, None, data, settings=given_settings, teacher=file, progress=False)
    (tmp_path / "broken").write_bytes(b"no safetensors")
    with pytest.raises(RecoveryError, match="cannot read"):
        recover(student, None, counting(), settings=chosen, teacher=tmp_path / "broken", progress=False)
    with pytest.raises(RecoveryError, match="top_k must be from 1 to"):
        precompute_teacher(teacher, None, counting(), tmp_path / "t", settings=chosen, top_k=VOCABULARY + 1)


def test_a_teacher_with_another_vocabulary_is_refused():
    student = tiny_llama()
    with pytest.raises(RecoveryError, match=f"another vocabulary: {VOCABULARY + 4} tokens against"):
        recover(student, None, counting(), teacher=tiny_llama(vocab_size=VOCABULARY + 4), progress=False)
    with pytest.raises(RecoveryError, match="hidden states of width"):
        chosen = RecoverySettings(**QUICK, distillation=Distillation(hidden_weight=1.0))
        recover(
            student, None, counting(), settings=chosen, teacher=tiny_llama(hidden_size=32), progress=False
        )
    with pytest.raises(RecoveryError, match="meta device"):
        recover(student, None, counting(), teacher=tiny_llama().to("meta"), progress=False)
    with pytest.raises(RecoveryError, match="teacher must be a model"):
        recover(student, None, counting(), teacher=3, progress=False)


def test_a_teacher_whose_tokenizer_has_other_words_is_refused():
    from test_recovery_data import word_tokenizer

    class Other:
        def get_vocab(self):
            return {"another": 0}

    with pytest.raises(RecoveryError, match="tokenizer has another vocabulary"):
        recover(tiny_llama(), word_tokenizer(), counting(), teacher=(tiny_llama(), Other()), progress=False)


def test_a_teacher_of_another_architecture_teaches():
    result = recover(
        tiny_llama(), None, counting(), settings=RecoverySettings(**{**QUICK, "max_steps": 20}),
        teacher=tiny_gpt2(), progress=False,
    )  # fmt: skip
    assert result.history[-1]["divergence"] < result.history[0]["divergence"]


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"weight": 1.1}, {"hidden_weight": -1}])
def test_distillation_settings_are_checked(changes):
    with pytest.raises(RecoveryError, match=next(iter(changes))):
        Distillation(**changes)
