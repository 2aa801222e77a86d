"""Peak memory against bytes counted by hand, and the latency's own arithmetic."""

import pytest
import torch
from test_evaluation_perplexity import tiny_llama
from torch import nn

from pruner_lib.evaluation import (
    EvaluationError,
    count_cost,
    evaluate,
    measure_latency,
    measure_memory,
    measuring,
)
from pruner_lib.evaluation.latency import Latency, _wait
from pruner_lib.evaluation.memory import _allocated_by
from pruner_lib.recovery import RecoverySettings
from pruner_lib.recovery.adapters import attach_lora
from pruner_lib.recovery.training import quiet

CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_at_once():
    def run():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(2000, 250)  # 2 MB, both alive: 3 MB
        del first
        third = torch.empty(250, 250)  # 0.25 MB
        return second, third

    assert _allocated_by(run, CPU) == 3_000_000


def test_weights_are_counted_once_and_logits_at_the_last_position_only():
    model = tiny_llama(torch.float32, tie_word_embeddings=True)
    found = measure_memory(model, batch_size=2, prompt_len=16)
    own = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert found.weight_bytes == 4 * own
    cache = count_cost(model).kv_cache_bytes_per_token * 2 * 16
    widest = 2 * 16 * 24 * 4  # the output of one MLP projection
    assert found.working_bytes > cache + widest
    assert found.peak_bytes == found.weight_bytes + found.working_bytes


def test_grows_with_the_prompt_and_repeats_exactly():
    model = tiny_llama(torch.float32)
    short, long = (measure_memory(model, prompt_len=length) for length in (8, 48))
    assert measure_memory(model, prompt_len=8) == short
    assert long.weight_bytes == short.weight_bytes
    assert long.working_bytes > 3 * short.working_bytes


def test_half_the_bytes_in_half_precision():
    full = measure_memory(tiny_llama(torch.float64), prompt_len=32)
    half = measure_memory(tiny_llama(torch.float32), prompt_len=32)
    assert 0.4 < half.peak_bytes / full.peak_bytes < 0.6


def test_prints_its_conditions():
    found = measure_memory(tiny_llama(torch.float32), batch_size=2, prompt_len=8)
    assert "at 2 × 8 tokens and one new one, on cpu" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"prompt_len": 0}, "prompt_len"),
        ({"prompt_len": 64}, "context of 64"),
    ],
)
def test_refuses_with_a_reason(arguments, message):
    with pytest.raises(EvaluationError, match=message):
        measure_memory(tiny_llama(torch.float32), **arguments)


def test_refuses_a_model_without_weights():
    with pytest.raises(EvaluationError, match="meta device"):
        measure_memory(tiny_llama().to("meta"))


WORDS = 5000
ALL_LOGITS = 4 * 47 * WORDS  # bytes of those that only one who wants every position's has


def wordy_llama():
    """Of a vocabulary that outweighs everything else."""
    model = tiny_llama(torch.float32)
    model.resize_token_embeddings(WORDS)
    return model


class Around(nn.Module):
    """A model behind a forward of its own."""

    def __init__(self):
        super().__init__()
        self.inner = wordy_llama()


class Cached(Around):
    """Decodes with a cache, but makes the logits of every position."""

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        return self.inner(input_ids, use_cache=use_cache, past_key_values=past_key_values)


class Uncached(Around):
    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids, use_cache=False)


class Bare(Around):
    def forward(self, input_ids):
        return self.inner(input_ids, use_cache=False).logits


class Forgetful(Around):
    """Takes everything, keeps nothing."""

    def forward(self, input_ids, **others):
        return self.inner(input_ids, use_cache=False)


def test_a_model_that_makes_all_logits_is_measured_with_them():
    found, kept = (measure_memory(model, prompt_len=48) for model in (Cached(), wordy_llama()))
    assert found.weight_bytes == kept.weight_bytes
    assert found.working_bytes > kept.working_bytes + ALL_LOGITS / 2
    (row,) = measure_latency({"m": Cached()}, prompt_lengths=(8,), new_tokens=2, repeats=1).rows
    assert row.first_token > 0


def test_an_adapted_model_is_asked_for_the_last_logits_as_its_base_is():
    plain = measure_memory(wordy_llama(), prompt_len=48)
    with quiet():
        adapted = measure_memory(attach_lora(wordy_llama(), RecoverySettings(rank=1)), prompt_len=48)
    assert adapted.working_bytes < plain.working_bytes + ALL_LOGITS / 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Uncached, r"Uncached.forward takes input_ids, use_cache, but not past_key_values\. Leave it out"),
        (Bare, r"Bare.forward takes input_ids, but not use_cache and past_key_values"),
        (Forgetful, "Forgetful returned CausalLMOutputWithPast without past_key_values"),
    ],
)
def test_a_missing_cache_is_named_before_anything_is_measured(monkeypatch, kind, message):
    model, good = kind(), tiny_llama(torch.float32)
    with pytest.raises(EvaluationError, match=f"measuring memory decodes with a KV cache.*{message}"):
        measure_memory(model, prompt_len=8)
    with pytest.raises(EvaluationError, match=f"measuring the latency of 'm' decodes.*{message}"):
        measure_latency({"m": model}, prompt_lengths=(8,))
    monkeypatch.setattr(
        measuring, "perplexity", lambda *a, **k: pytest.fail("measured before it was refused")
    )
    for asked in ({"memory": {}}, {"latency": {}}):
        with pytest.raises(EvaluationError, match=f"model 'odd': .*{message}"):
            evaluate({"good": good, "odd": model}, None, text=torch.arange(40), seq_len=8, **asked)


def test_a_clock_waits_for_the_device_it_is_asked_about(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in ("cpu", "cuda:1", "mps"):
        _wait(torch.device(device))
    assert waited == [torch.device("cuda:1"), torch.device("mps")]


def latency(**changes):
    numbers = dict.fromkeys(
        ("first_token", "first_token_spread", "tokens_per_second", "tokens_per_second_spread"), 1.0
    )
    ratios = dict.fromkeys(("first_token_ratio", "speed_ratio", "macs_ratio"), 1.0)
    return Latency(**{"model": "m", "batch_size": 1, "prompt_len": 8, **numbers, **ratios, **changes})


@pytest.mark.parametrize(
    ("time", "macs", "kept"),
    [(0.8, 0.8, 1.0), (0.9, 0.8, 0.5), (1.0, 0.75, 0.0), (1.1, 0.8, -0.5), (0.9, 1, None)],
)
def test_how_much_of_the_promise_was_kept(time, macs, kept):
    found = latency(first_token_ratio=time, macs_ratio=macs).promise_kept
    assert found is None if kept is None else found == pytest.approx(kept)


def test_latency_refuses_models_on_different_devices_or_elsewhere():
    model = tiny_llama(torch.float32)

    class Elsewhere(nn.Module):
        """Claims to be on another device, which a machine without one cannot make."""

        config = model.config

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def get_input_embeddings(self):
            return type("Embedding", (), {"weight": type("W", (), {"device": torch.device("cuda:0")})})

    with pytest.raises(EvaluationError, match=r"'far' is on cuda:0, the first model on cpu"):
        measure_latency({"near": model, "far": Elsewhere()}, prompt_lengths=(4,), new_tokens=2)
    with pytest.raises(EvaluationError, match="cuda was asked for, but the model is on cpu"):
        measure_latency({"near": model}, device="cuda")


def test_a_busy_machine_is_named_in_the_warning(monkeypatch):
    model = tiny_llama(torch.float32)
    times = iter([(1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0)])
    monkeypatch.setattr("pruner_lib.evaluation.latency._decode", lambda *arguments: next(times))
    monkeypatch.setattr("os.getloadavg", lambda: (7.5, 0.0, 0.0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.warns(UserWarning, match=r"vary widely.*busy \(the load was 7.5 on 2 cores before the run\)"):
        measure_latency({"m": model}, prompt_lengths=(8,), repeats=3)
