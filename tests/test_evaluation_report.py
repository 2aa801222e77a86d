"""Generation, latency and the report, on tiny models."""

import json
import warnings

import pytest
import torch
from test_evaluation_perplexity import VOCABULARY, stream, tiny_llama, word_tokenizer

from pruner_lib.evaluation import (
    EvaluationError,
    EvaluationReport,
    count_cost,
    evaluate,
    generate,
    measure_latency,
    perplexity,
)
from pruner_lib.evaluation.generation import distinct_n, repetition

PROMPTS = ["w1 w2 w3", "w9 w8"]


@pytest.fixture(scope="module")
def pair():
    small = tiny_llama(torch.float32)
    torch.manual_seed(1)
    other = type(small)(type(small.config)(**{**small.config.to_dict(), "intermediate_size": 12})).eval()
    return {"dense": small, "pruned": other}


def test_ngram_statistics_by_hand():
    assert distinct_n([5, 6, 5, 6], 1) == 0.5
    assert distinct_n([5, 6, 5, 6], 2) == pytest.approx(2 / 3)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repetition(list(range(20))) == 0.0
    assert repetition([1, 2]) == 0.0, "too short to repeat"


def test_greedy_generation_is_the_arg_max(pair):
    table = generate(pair, word_tokenizer(eos_token="</s>"), PROMPTS, max_new_tokens=6)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, pair["dense"](ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == VOCABULARY - 1:
                break
    expected = word_tokenizer(eos_token="</s>").decode(ids[0, 3:], skip_special_tokens=True)
    assert table.text("dense", PROMPTS[0]) == expected
    assert table.models == ("dense", "pruned")
    assert table.prompts == tuple(PROMPTS)
    assert [(row.prompt, row.model) for row in table.rows] == [(p, m) for p in PROMPTS for m in pair]


def test_sampling_depends_on_the_seed_alone(pair):
    tokenizer = word_tokenizer(eos_token="</s>")
    state = torch.get_rng_state()
    options = {"max_new_tokens": 12, "do_sample": True}
    both = generate(pair, tokenizer, PROMPTS, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    alone = generate({"pruned": pair["pruned"]}, tokenizer, PROMPTS[1], seed=3, **options)
    assert alone.text("pruned", PROMPTS[1]) == both.text("pruned", PROMPTS[1])
    other = generate(pair, tokenizer, PROMPTS, seed=4, **options)
    assert other.rows != both.rows


@pytest.mark.parametrize("do_sample", [False, True])
def test_generation_tells_every_token_and_writes_the_same(pair, do_sample):
    told = []
    options = {"max_new_tokens": 5, "do_sample": do_sample}
    tokenizer = word_tokenizer(eos_token="</s>")
    table = generate(pair, tokenizer, PROMPTS, on_text=lambda *words: told.append(words), **options)
    assert table == generate(pair, tokenizer, PROMPTS, **options)
    for row in table.rows:
        texts = [text for model, prompt, text in told if (model, prompt) == (row.model, row.prompt)]
        assert len(texts) == row.num_tokens and texts[-1] == row.text
        assert all(row.text.startswith(text) for text in texts)


def test_generation_ends_when_told_to(pair):
    tokenizer, told = word_tokenizer(eos_token="</s>"), []

    def on_text(model, prompt, text):
        told.append(model)
        return len(told) == 2

    table = generate(pair, tokenizer, PROMPTS, max_new_tokens=9, on_text=on_text)
    assert [row.num_tokens for row in table.rows] == [2] + [0] * (len(table.rows) - 1)
    assert table.text("pruned", PROMPTS[-1]) == "" and len(table.rows) == 2 * len(PROMPTS)


def test_generation_table_shows_everything(pair):
    table = generate(pair, word_tokenizer(eos_token="</s>"), ["w1 w2"], max_new_tokens=5)
    assert "> w1 w2" in str(table)
    assert table.text("pruned", "w1 w2") in str(table)
    assert table.to_markdown().splitlines()[0] == "| prompt | dense | pruned |"
    assert set(table.statistics()["dense"]) == {"repetition", "distinct_1", "distinct_2", "num_tokens"}
    assert "<table>" in table._repr_html_()
    with pytest.raises(EvaluationError, match="no generation of 'nobody'"):
        table.text("nobody", "w1 w2")


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "at least one prompt"),
        (["w1", ""], {}, "none that is empty"),
        (["w1 " * 60], {"max_new_tokens": 10}, "context of 64"),
        (["w1"], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_generation_refuses(pair, prompts, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        generate(pair, word_tokenizer(eos_token="</s>"), prompts, **arguments)


def test_generation_refuses_a_tokenizer_that_does_not_fit(pair):
    with pytest.raises(EvaluationError, match=r"prompt 'w50' holds token id 50.*0 to 49"):
        generate(pair, word_tokenizer(words=60), "w50", max_new_tokens=2)


def test_latency_has_every_combination_and_ratios_to_the_first(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test machine may well be busy
        table = measure_latency(pair, batch_sizes=(1, 2), prompt_lengths=(4, 8), new_tokens=3, repeats=3)
    assert [(r.batch_size, r.prompt_len, r.model) for r in table.rows] == [
        (b, length, name) for b in (1, 2) for length in (4, 8) for name in pair
    ]
    for first, second in zip(table.rows[::2], table.rows[1::2], strict=True):
        assert first.first_token_ratio == first.speed_ratio == first.macs_ratio == 1.0
        assert second.first_token_ratio == pytest.approx(second.first_token / first.first_token)
        dense, pruned = (
            count_cost(model, batch_size=first.batch_size, seq_len=first.prompt_len).macs
            for model in pair.values()
        )
        assert second.macs_ratio == pruned / dense < 1
        assert first.first_token > 0
        assert first.tokens_per_second > 0
    assert "median ± interquartile range of 3 runs" in str(table)
    assert "<table>" in table._repr_html_()
    assert table.to_markdown().startswith("| model | batch |")


def test_latency_warns_when_times_vary(monkeypatch, pair):
    times = iter(
        [(1.0, 10.0)] * 2 + [(1.0, 10.0), (1.0, 10.0), (9.0, 2.0), (1.0, 10.0), (5.0, 4.0), (1.0, 10.0)]
    )
    monkeypatch.setattr("pruner_lib.evaluation.latency._decode", lambda *arguments: next(times))
    with pytest.warns(UserWarning, match=r"vary widely.*dense \("):
        table = measure_latency(pair, prompt_lengths=(8,), repeats=3)
    assert table.rows[0].first_token == 5.0
    assert table.rows[1].spread == 0.0


@pytest.mark.parametrize(
    "arguments", [{"new_tokens": 1}, {"repeats": 0}, {"batch_sizes": (0,)}, {"prompt_lengths": (60,)}]
)
def test_latency_refuses(pair, arguments):
    with pytest.raises(EvaluationError):
        measure_latency(pair, **arguments)


def test_report_holds_what_the_single_functions_give(pair):
    ids = stream(60)
    report = evaluate(pair, None, text={"made up": ids, "more": ids[:24]}, seq_len=12, cost_at=(2, 8))
    assert report.models == ("dense", "pruned")
    assert report.sources == ("made up", "more")
    for name, model in pair.items():
        assert report[name].cost == count_cost(model, batch_size=2, seq_len=8)
        assert report[name].perplexity == perplexity(model, None, ids, seq_len=12, source="made up")
    assert report.ratio("dense") == 1.0
    assert report.ratio("pruned", "macs") == report["pruned"].cost.macs / report["dense"].cost.macs
    assert report.ratio("pruned", "perplexity") == report.ratio("pruned", "made up")


def test_report_prints_and_saves(pair, tmp_path):
    report = evaluate(
        {"<dense> | 1": pair["dense"], "pruned": pair["pruned"]}, None, text=stream(60), seq_len=12
    )
    path = report.save(tmp_path / "report.json")
    assert EvaluationReport.load(path) == report
    assert json.loads(path.read_text())["rows"][1]["cost"]["params"] == report["pruned"].cost.params
    header, first, second, conditions = str(report).splitlines()
    assert header.split()[:2] == ["model", "parameters"]
    assert "MACs at 1 × 64 tokens" in conditions
    assert "windows of 12" in conditions
    assert f"{report['pruned'].perplexity:.2f}" in second
    assert first.startswith("<dense> | 1")
    assert "&lt;dense&gt;" in report._repr_html_()
    assert "<dense>" not in report._repr_html_()
    lines = report.to_markdown().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1


def test_report_without_text_is_cost_alone(pair):
    report = evaluate(pair, None)
    assert report["dense"].perplexity is None
    assert report.sources == ()
    with pytest.raises(EvaluationError, match="no number 'perplexity'"):
        report.ratio("pruned", "perplexity")


def test_report_refuses(pair, tmp_path):
    with pytest.raises(EvaluationError, match="no model was given"):
        evaluate({}, None)
    with pytest.raises(EvaluationError, match="give the models as"):
        evaluate(pair["dense"], None)
    with pytest.raises(EvaluationError, match="model 'dense': the text has 3 tokens"):
        evaluate(pair, None, text=stream(3), seq_len=12)
    with pytest.raises(EvaluationError, match=r"no model 'x'.*dense, pruned"):
        evaluate(pair, None)["x"]
    broken = tmp_path / "broken.json"
    broken.write_text('{"rows": []}')
    with pytest.raises(EvaluationError, match="not an evaluation report"):
        EvaluationReport.load(broken)
