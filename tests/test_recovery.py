"""LoRA recovery on tiny models: what changes, what must not, and what is said when it cannot be done."""

import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recovery_models import QUICK, VOCABULARY, counting, same, snapshot, tiny_gpt2, tiny_llama
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pruner_lib.recovery import NonFiniteLossError, RecoveryError, RecoverySettings, linear_modules, recover
from pruner_lib.recovery.adapters import attach_lora, finish
from pruner_lib.recovery.data import Example, collate
from pruner_lib.recovery.losses import token_losses
from pruner_lib.recovery.recording import Recorder


@pytest.fixture(scope="module")
def trained():
    model = tiny_llama()
    before = snapshot(model)
    settings = RecoverySettings(**{**QUICK, "max_steps": 25})
    return model, before, recover(model, None, counting(), settings=settings, progress=False)


def test_the_given_model_is_untouched_bit_for_bit(trained):
    model, before, result = trained
    assert same(snapshot(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not same(snapshot(result.model), before), "the returned one did learn"


def test_loss_falls_on_a_repetitive_text(trained):
    _, _, result = trained
    assert len(result.history) == 25
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert [record["step"] for record in result.history] == list(range(1, 26))
    assert result.num_tokens == 25 * 4 * 11


def test_first_loss_is_the_given_models_own(trained):
    """LoRA at the start is the identity, and a step's loss is the mean over its predicted tokens."""
    model, _, _ = trained
    data = counting(rows=4)
    with torch.no_grad():
        logits = model(data).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    result = recover(model, None, data, settings=RecoverySettings(**QUICK), progress=False)
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_result_is_an_ordinary_model_of_the_same_class(trained, tmp_path):
    model, _, result = trained
    assert type(result.model) is type(model)
    assert not isinstance(result.model, PeftModel)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in result.model.named_modules()
    ]
    for (_, first), (_, second) in zip(model.named_modules(), result.model.named_modules(), strict=True):
        assert vars(first).keys() == vars(second).keys()
        assert first.training == second.training
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert result.model.config.to_dict() == model.config.to_dict()
    result.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(counting()).logits, result.model(counting()).logits)
    assert result.model.generate(counting(2, 4), max_new_tokens=3, do_sample=False).shape == (2, 7)


def test_only_linear_layers_but_the_head_change(trained):
    _, before, result = trained
    changed = {name for name, value in snapshot(result.model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in linear_modules(result.model)}
    assert "lm_head" not in linear_modules(result.model)
    assert len(linear_modules(result.model)) == 2 * 7


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_lora_at_the_start_is_the_identity(make):
    model = make()
    adapted = attach_lora(model, RecoverySettings()).eval()
    data = counting()
    assert torch.equal(adapted(data).logits, model(data).logits)
    assert same(snapshot(finish(adapted, model)), snapshot(model))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merging_adds_scaled_b_a_and_keeps_the_logits(make):
    model = make()
    settings = RecoverySettings(rank=3, alpha=12)
    adapted = attach_lora(model, settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    name = linear_modules(model)[0]
    layer = adapted.get_submodule(f"base_model.model.{name}")
    update = 12 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    unmerged = adapted(counting()).logits.detach()
    merged = finish(adapted, model)
    assert not torch.allclose(unmerged, model(counting()).logits, atol=1e-2)
    torch.testing.assert_close(merged(counting()).logits, unmerged, atol=1e-4, rtol=1e-4)
    weight = model.get_submodule(name).weight
    expected = weight + (update.T if make is tiny_gpt2 else update)
    torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_tied_weights_stay_tied():
    model = tiny_llama(tie_word_embeddings=True)
    result = recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert torch.equal(result.model.lm_head.weight, model.lm_head.weight)


def test_the_same_seed_gives_the_same_weights_and_no_global_state_changes():
    model = tiny_llama(attention_dropout=0.2)
    settings = RecoverySettings(**QUICK, dropout=0.1, seed=5)
    environment = dict(os.environ)
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = recover(model, None, counting(), settings=settings, progress=False)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert dict(os.environ) == environment
    torch.manual_seed(12)
    second = recover(model, None, counting(), settings=settings, progress=False)
    assert first.losses == second.losses
    assert same(snapshot(first.model), snapshot(second.model))
    other = recover(
        model, None, counting(), settings=RecoverySettings(**QUICK, dropout=0.1, seed=6), progress=False
    )
    assert other.losses != first.losses


def test_micro_batches_add_up():
    """Two micro-batches of uneven length make the step that one batch makes."""
    model = tiny_llama()
    whole = RecoverySettings(**{**QUICK, "micro_batch": 4, "max_steps": 3})
    parts = RecoverySettings(**{**QUICK, "micro_batch": 1, "max_steps": 3})
    data = counting(rows=4)
    first, second = (recover(model, None, data, settings=s, progress=False) for s in (whole, parts))
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    for name, value in snapshot(second.model).items():
        torch.testing.assert_close(value, first.model.state_dict()[name], atol=1e-4, rtol=1e-3)


def test_uneven_micro_batches_weigh_tokens_not_sequences():
    long = Example(torch.arange(5), torch.tensor([-100, 1, 2, 3, 4]))
    short = Example(torch.arange(5), torch.tensor([-100, -100, -100, -100, 4]))
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    both = collate([long, short], 0)["labels"]
    found = [token_losses(logits[i : i + 1], both[i : i + 1]) for i in range(2)]
    chosen = torch.cat([logits[0, :4], logits[1, 3:4]])
    expected = functional.cross_entropy(chosen, torch.tensor([1, 2, 3, 4, 4]))
    torch.testing.assert_close(sum(losses.total for losses in found) / 5, expected)
    assert [losses.count for losses in found] == [4, 1]


def test_bf16_autocast_keeps_float32_weights_and_can_alternate():
    model = tiny_llama()
    wide = recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    narrow = recover(
        model, None, counting(), settings=RecoverySettings(**{**QUICK, "bf16": True}), progress=False
    )
    again = recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.float32}
    assert narrow.losses != wide.losses
    assert narrow.losses == pytest.approx(wide.losses, rel=0.05)
    assert again.losses == wide.losses


def test_bfloat16_weights_stay_bfloat16():
    model = tiny_llama().to(torch.bfloat16)
    result = recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.losses[-1] < result.losses[0]


def test_a_chosen_target_and_frozen_parameters():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    settings = RecoverySettings(**QUICK, target=("q_proj", "layers.1.mlp.down_proj"))
    result = recover(model, None, counting(), settings=settings, progress=False)
    before = snapshot(model)
    changed = {name for name, value in snapshot(result.model).items() if not torch.equal(value, before[name])}
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert changed == {*layers, "model.layers.1.mlp.down_proj.weight"}
    assert not result.model.model.norm.weight.requires_grad


def test_epochs_pass_over_all_data():
    settings = RecoverySettings(**{**QUICK, "max_steps": None}, epochs=2)
    result = recover(tiny_llama(), None, counting(rows=8), settings=settings, progress=False)
    assert (len(result.history), result.num_tokens) == (4, 2 * 8 * 11)


def test_on_step_sees_every_step_and_can_stop(capfd):
    seen = []

    def watch(record):
        seen.append(record)
        return record["step"] == 3

    result = recover(tiny_llama(), None, counting(), settings=RecoverySettings(**QUICK), on_step=watch)
    assert [record["step"] for record in seen] == [1, 2, 3]
    assert list(result.history) == seen
    captured = capfd.readouterr()
    assert captured.out == "", "nothing but the bar, and that on standard error"
    assert "recover" in captured.err


def test_the_adapter_alone_gives_the_merged_model(tmp_path):
    model = tiny_llama()
    settings = RecoverySettings(**QUICK)
    for _ in range(2):  # the second replaces the first
        result = recover(model, None, counting(), settings=settings, output_dir=tmp_path, progress=False)
    assert result.adapter_path == tmp_path / "adapter"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    attached = PeftModel.from_pretrained(tiny_llama(), result.adapter_path).eval()
    torch.testing.assert_close(
        attached(counting()).logits, result.model(counting()).logits, atol=1e-4, rtol=1e-4
    )


def test_a_loss_that_turns_nan_stops_and_keeps_the_best_state(tmp_path):
    model = tiny_llama()
    before = snapshot(model)
    rows = counting(rows=40)

    def poison(record):
        """From step 4 on, every batch meets a token whose embedding is no number."""
        if record["step"] == 3:
            rows.fill_(VOCABULARY - 1)

    model.model.embed_tokens.weight.data[VOCABULARY - 1] = float("nan")
    before = snapshot(model)
    with pytest.raises(NonFiniteLossError, match=r"step 4.*learning_rate") as caught:
        recover(
            model, None, rows[:, :8], settings=RecoverySettings(**QUICK), on_step=poison, output_dir=tmp_path,
            progress=False,
        )  # fmt: skip
    result = caught.value.result
    assert (caught.value.step, len(result.history)) == (4, 3)
    linear = [result.model.get_submodule(name).weight for name in linear_modules(result.model)]
    assert all(torch.isfinite(weight).all() for weight in linear)
    assert result.adapter_path == tmp_path / "adapter"
    after = snapshot(model)
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)


def test_the_best_state_is_that_of_the_lowest_loss():
    weight = torch.nn.Parameter(torch.zeros(1))
    recorder = Recorder({"lora_A": weight})
    optimizer = torch.optim.SGD([weight], lr=1.0)
    labels = torch.tensor([[-100, 0]])
    for number, value in enumerate((1.0, 4.0, -6.0, -6.0), start=1):  # good, better, bad, bad
        found = token_losses(torch.tensor([[[value, 0.0], [0.0, 0.0]]]), labels)
        recorder.add(found, float(found.total))
        state = SimpleNamespace(global_step=number, max_steps=9, is_world_process_zero=True)
        recorder.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        weight.data.fill_(number)
        recorder.on_step_end(None, state, SimpleNamespace())
    recorder.restore_best()
    assert weight.item() == 1.0, "what was there when step 2 measured the lowest mean loss"


def test_nan_from_the_first_step_returns_the_given_model():
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="as it was given") as caught:
        recover(model, None, counting(), settings=RecoverySettings(**QUICK), progress=False)
    assert caught.value.step == 1
    assert caught.value.result.history == ()
    linear = linear_modules(model)
    found = caught.value.result.model
    assert all(torch.equal(found.get_submodule(n).weight, model.get_submodule(n).weight) for n in linear)


def test_a_model_that_carries_an_adapter_is_refused():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = get_peft_model(tiny_llama(), config)
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(RecoveryError, match="already carries an adapter"):
            recover(model, None, counting())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros((0, 8), dtype=torch.long), "empty"),
        (torch.zeros(8, dtype=torch.long), r"\[N, L\]"),
        (torch.zeros((2, 8)), "integers"),
        (torch.full((2, 8), VOCABULARY), f"token id {VOCABULARY}"),
        (torch.zeros((2, 65), dtype=torch.long), "context of 64"),
        ("", "empty"),
        ([], "empty list"),
        (["a text"], "a list that holds str"),
        (3, "int"),
    ],
)
def test_unusable_data_is_refused(data, message):
    with pytest.raises(RecoveryError, match=message):
        recover(tiny_llama(), None, data, settings=RecoverySettings(**QUICK), progress=False)


def test_unusable_models_and_targets_are_refused():
    with pytest.raises(RecoveryError, match="meta device"):
        recover(tiny_llama().to("meta"), None, counting())
    with pytest.raises(RecoveryError, match=r"no linear layer matches.*down_proj"):
        recover(tiny_llama(), None, counting(), settings=RecoverySettings(**QUICK, target=("c_attn",)))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0}, {"rank": 1.5}, {"alpha": 0}, {"dropout": 1.0}, {"learning_rate": -1}, {"micro_batch": 3},
        {"learning_rate": math.nan}, {"seq_len": 1}, {"max_steps": 0}, {"max_steps": None}, {"epochs": 1.0},
        {"max_steps": None, "epochs": 0}, {"warmup_steps": -1}, {"target": "q_proj"}, {"target": ()},
        {"seed": -1},
    ],
)  # fmt: skip
def test_settings_are_checked(changes):
    with pytest.raises(RecoveryError, match=list(changes)[-1]):
        RecoverySettings(**changes)


def test_the_papers_settings():
    paper = RecoverySettings.paper()
    found = (paper.rank, paper.alpha, paper.dropout, paper.learning_rate, paper.batch_size, paper.micro_batch)
    assert found == (8, 16, 0.05, 1e-4, 64, 4)
    assert (paper.epochs, paper.max_steps, paper.warmup_steps, paper.seq_len) == (2, None, 100, 256)
    assert RecoverySettings.paper(max_steps=7).epochs is None
    with pytest.raises(RecoveryError, match="unknown setting lr"):
        RecoverySettings.paper(lr=1)


def test_bfloat16_is_left_alone_where_the_device_only_imitates_it(monkeypatch):
    chosen = []
    for native in (False, True):
        monkeypatch.setattr("pruner_lib.recovery.settings.computes_in_bfloat16", lambda device, it=native: it)
        chosen.append(RecoverySettings().on(torch.device("cpu")).bf16)
    assert chosen == [False, True]
    assert RecoverySettings(bf16=True).on(torch.device("meta")).bf16 is True  # what is asked for is done
