"""Perplexity against a plain loop, and every refusal, on tiny models."""

import math

import pytest
import torch
from plain import WIDTH, Decoder, TorchBlock
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruner_lib.evaluation import EvaluationError, Perplexity, evaluate, perplexity

VOCABULARY = 50


def tiny_llama(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        initializer_range=0.3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def word_tokenizer(words=VOCABULARY, **special):
    words = {f"w{i}": i for i in range(words - 2)} | {"<s>": words - 2, "</s>": words - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def stream(count, seed=1):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def plain_loop(model, windows):
    """exp of the mean of −log softmax, token by token, window by window."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0]
        losses += [
            -functional.log_softmax(logits[t].double(), -1)[window[t + 1]] for t in range(len(window) - 1)
        ]
    return math.exp(torch.stack(losses).mean()), len(losses)


@torch.no_grad()
def test_equals_a_plain_loop_and_drops_the_tail():
    model, ids = tiny_llama(), stream(67)
    expected, count = plain_loop(model, [ids[i : i + 12] for i in range(0, 60, 12)])
    found = perplexity(model, None, ids, seq_len=12)
    assert found.num_tokens == count == 5 * 11
    assert float(found) == pytest.approx(expected, rel=1e-12)
    # The tail of 7 tokens changes nothing.
    assert perplexity(model, None, ids[:60], seq_len=12) == found


class Logits(nn.Module):
    """A module that knows of no cache and returns nothing but logits."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_llama()

    def forward(self, input_ids):
        return self.inner(input_ids, use_cache=False).logits


class Positional(Logits):
    def forward(self, ids):
        return (super().forward(ids),)


@pytest.mark.parametrize("kind", [Logits, Positional])
def test_any_module_from_token_ids_to_logits_will_do(kind):
    expected = perplexity(tiny_llama(), None, stream(60), seq_len=12)
    assert perplexity(kind(), None, stream(60), seq_len=12) == expected


def test_a_plain_module_has_a_report():
    plain = Decoder(TorchBlock, lambda: nn.LayerNorm(WIDTH))
    report = evaluate({"m": plain}, None, text=stream(60), seq_len=12)
    assert report["m"].cost.macs > 0
    assert report["m"].perplexity == perplexity(plain, None, stream(60), seq_len=12, source="text")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_does_not_depend_on_the_batch_size(batch_size):
    model, ids = tiny_llama(), stream(60)
    reference = perplexity(model, None, ids, seq_len=12, batch_size=4)
    assert float(perplexity(model, None, ids, seq_len=12, batch_size=batch_size)) == pytest.approx(
        float(reference), rel=1e-12
    )


@torch.no_grad()
def test_half_precision_weights_are_scored_in_float32():
    model, ids = tiny_llama(torch.bfloat16), stream(48)
    losses = []
    for window in ids.view(-1, 16):
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(functional.cross_entropy(logits, window[1:], reduction="none"))
    found = perplexity(model, None, ids, seq_len=16, batch_size=1)
    assert found.dtype == "bfloat16"
    assert float(found) == pytest.approx(math.exp(torch.cat(losses).double().mean()), rel=1e-6)


def test_text_is_tokenised_without_special_tokens():
    model, tokenizer = tiny_llama(), word_tokenizer()
    ids = torch.arange(40) % (VOCABULARY - 2)
    text = " ".join(f"w{i}" for i in ids.tolist())
    assert perplexity(model, tokenizer, text, seq_len=10) == perplexity(model, None, ids, seq_len=10)


def test_rows_are_separate_streams():
    model, ids = tiny_llama(), stream(60).view(4, 15)
    kept = torch.cat([ids[:, :7], ids[:, 7:14]], dim=1).reshape(-1)
    found = perplexity(model, None, ids, seq_len=7)
    assert float(found) == pytest.approx(float(perplexity(model, None, kept, seq_len=7)), rel=1e-12)
    assert found.num_tokens == 8 * 6


@torch.no_grad()
def test_bos_stands_before_every_window_and_is_not_predicted():
    model, ids = tiny_llama(), stream(33)
    tokenizer = word_tokenizer(bos_token="<s>")
    first = torch.tensor([tokenizer.bos_token_id])
    windows = [torch.cat([first, ids[i : i + 11]]) for i in range(0, 33, 11)]
    expected, count = plain_loop(model, windows)
    found = perplexity(model, tokenizer, ids, seq_len=12, bos=True)
    assert (found.num_tokens, found.bos) == (count, True)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_max_tokens_reads_whole_windows_from_the_start():
    model, ids = tiny_llama(), stream(60)
    assert perplexity(model, None, ids, seq_len=12, max_tokens=30) == perplexity(
        model, None, ids[:24], seq_len=12
    )


def test_leaves_the_model_as_it_was():
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = perplexity(model, None, stream(24), seq_len=12)
    assert perplexity(model, None, stream(24), seq_len=12) == first, "dropout must be off"
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_says_its_conditions():
    found = perplexity(tiny_llama(torch.float32), None, stream(24), seq_len=12, source="made up")
    assert str(found) == (
        f"perplexity {found.value:.2f} (made up, windows of 12, 22 tokens predicted, no BOS, float32)"
    )
    assert f"{found:.1f}" == f"{float(found):.1f}"


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    assert float(perplexity(model, None, stream(24), seq_len=12)) == pytest.approx(VOCABULARY)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("  \n", {}, "empty"),
        (torch.zeros(0, dtype=torch.long), {}, "empty"),
        (torch.zeros(2, 3), {}, "integer token ids"),
        (["w1"], {}, "got list"),
        (stream(7), {"seq_len": 12}, "7 tokens, too few for one window of 12"),
        (stream(80), {"seq_len": 65}, "context of 64"),
        (stream(30), {"seq_len": 1}, "at least 2"),
        (stream(30), {"seq_len": 12, "batch_size": 0}, "batch_size"),
        (stream(30), {"seq_len": 12, "max_tokens": 11}, "max_tokens 11"),
        (torch.full((30,), VOCABULARY), {"seq_len": 12}, f"token id {VOCABULARY}.*0 to {VOCABULARY - 1}"),
        (torch.full((30,), -1), {"seq_len": 12}, "token id -1"),
        (stream(30), {"seq_len": 12, "bos": True}, "no BOS token"),
    ],
)
def test_refuses_with_a_reason(text, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        perplexity(tiny_llama(), word_tokenizer(), text, **{"seq_len": 12, **arguments})


def test_refuses_a_string_without_tokenizer_and_a_model_without_weights():
    with pytest.raises(EvaluationError, match="tokenizer"):
        perplexity(tiny_llama(), None, "w1 w2", seq_len=12)
    with pytest.raises(EvaluationError, match="meta device"):
        perplexity(tiny_llama().to("meta"), None, stream(30), seq_len=12)


def test_a_loss_that_is_not_finite_names_the_window():
    model = tiny_llama(torch.float32)
    ids = torch.zeros(36, dtype=torch.long)
    ids[30] = 9
    model.model.embed_tokens.weight.data[9] = float("nan")
    with pytest.raises(FloatingPointError, match="window 2"):
        perplexity(model, None, ids, seq_len=12)


def test_an_overflowing_perplexity_is_infinite():
    model = tiny_llama()
    model.lm_head.weight.data *= 1e6
    found = perplexity(model, None, stream(24), seq_len=12)
    assert isinstance(found, Perplexity)
    assert float(found) == math.inf


@pytest.mark.real_model
def test_smollm2_on_wikitext2_equals_a_plain_loop():
    from pruner_lib.assets import load_model, load_text

    model, tokenizer = load_model()
    text = load_text("wikitext2", "test")[:6000]
    found = perplexity(model, tokenizer, text, max_tokens=512)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:512], device=model.device)
    with torch.no_grad():
        expected, count = plain_loop(model, ids.view(4, 128))
    assert found.num_tokens == count == 4 * 127
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert 10 < float(found) < 150
