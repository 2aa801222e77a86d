"""Chat templates, packing, instruction files, and what a model writes for its own recovery."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_models import QUICK, VOCABULARY, same, snapshot, tiny_llama
from test_recovery_data import ADD, IDS, WORDS, word_tokenizer
from zoo import CONFIGURATIONS, tiny

from pruner_lib.assets import AssetError
from pruner_lib.recovery import RecoveryError, RecoverySettings, format_chat, recover
from pruner_lib.recovery.data import Example, collate, make_examples
from pruner_lib.recovery.packing import keeps_apart, pack
from pruner_lib.recovery.preparation import prepare_examples
from pruner_lib.recovery.self_generated import (
    SelfGeneration,
    _Sieve,
    generate_instructions,
    main,
)
from pruner_lib.recovery.sources import ALPACA, load_instructions, load_seed_prompts

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def chat_tokenizer():
    tokenizer = word_tokenizer(bos_token="<s>", pad_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def decoded(example, learnt):
    return [
        WORDS[token]
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
        if (label != -100) == learnt
    ]


def test_a_conversation_learns_what_the_assistant_says_and_its_end():
    example = format_chat(chat_tokenizer(), turns("Add 2", "5", "Add 3", "2 3"), seq_len=64)
    assert decoded(example, True) == ["5", "</s>", "2", "3", "</s>"]
    unknown = "<unk>"  # "user" and "assistant" are no words of this tokenizer
    assert decoded(example, False) == [
        "<s>", unknown, "Add", "2", "</s>", "<s>", unknown,
        "<s>", unknown, "Add", "3", "</s>", "<s>", unknown,
    ]  # fmt: skip
    assert len(format_chat(chat_tokenizer(), turns("Add 2", "5"), seq_len=5)) == 5


def test_instructions_in_the_chat_template_are_a_conversation_of_two():
    rows = make_examples(chat_tokenizer(), [ADD], seq_len=64, template="chat")
    assert decoded(rows[0], True) == ["5", "</s>"]
    both = make_examples(chat_tokenizer(), [{"messages": turns("Add 2", "5")}, ADD], seq_len=64)
    assert decoded(both[0], True) == decoded(both[1], True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "example 3: messages must be"),
        ("Add", "messages must be"),
        ([{"role": "user"}], "messages must be"),
        (turns("Add"), "example 3 has no response"),
        (turns("Add", "  "), "example 3 has no response"),
    ],
)
def test_conversations_without_response_are_refused(messages, message):
    with pytest.raises(RecoveryError, match=message):
        format_chat(chat_tokenizer(), messages, seq_len=64, number=3)


def test_templates_that_are_missing_or_rewrite_the_past_are_refused():
    with pytest.raises(RecoveryError, match="no chat template"):
        format_chat(word_tokenizer(), turns("Add", "5"), seq_len=64)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} " + TEMPLATE
    with pytest.raises(RecoveryError, match="rewrites earlier turns"):
        format_chat(tokenizer, turns("Add", "5", "Add", "2"), seq_len=64)


def test_rows_of_text_are_joined_by_the_end_token():
    rows = make_examples(word_tokenizer(), [{"text": "2 3"}, {"text": "5 2"}], seq_len=3)
    assert [row.input_ids.tolist() for row in rows] == [[9, 10, IDS["</s>"]], [11, 9, IDS["</s>"]]]
    with pytest.raises(RecoveryError, match="example 1 has an empty text"):
        make_examples(word_tokenizer(), [{"text": "2"}, {"text": " "}], seq_len=3)


def random_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        found.append(Example(ids, labels))
    return found


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_packing_loses_nothing_and_never_overflows(lengths):
    examples = random_examples(lengths)
    rows = pack(examples, 20)
    assert all(len(row) <= 20 for row in rows)
    assert sum(map(len, rows)) == sum(lengths)
    assert sum(row.num_predicted for row in rows) == sum(e.num_predicted for e in examples)
    starts = sum(1 if row.positions is None else int((row.positions == 0).sum()) for row in rows)
    assert starts == len(examples)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // 20))


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n not in ("llama_mha", "falcon_old")])
def test_packed_rows_are_exact_or_refused(name):
    """Where a model says it keeps examples apart, the loss of packed rows is that of padded ones."""
    model = tiny(name, torch.float32)
    examples = random_examples([7, 5, 9, 4, 6])
    rows = pack(examples, 16)
    assert len(rows) == 2

    def loss(some):
        batch = collate(some, 0)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    with torch.no_grad():
        if keeps_apart(model, examples):
            assert float(loss(rows)) == pytest.approx(float(loss(examples)), rel=1e-4)
        else:
            assert name in ("bloom", "mpt", "opt", "gpt_bigcode", "falcon_new"), "those without position_ids"


def test_packed_recovery_is_padded_recovery_with_fewer_rows():
    model = tiny_llama()
    data = [{**ADD, "input": "2 " * n} for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    packed = RecoverySettings(**{**QUICK, "max_steps": 1, "batch_size": 4, "micro_batch": 4}, seq_len=60)
    padded = RecoverySettings(**{**QUICK, "max_steps": 1, "batch_size": 8, "micro_batch": 8}, packing=False)
    first, second = (
        recover(model, word_tokenizer(), data, settings=s, progress=False) for s in (packed, padded)
    )
    assert first.num_examples < second.num_examples == 8
    assert second.losses[0] == pytest.approx(first.losses[0], rel=0.05)


def test_a_model_that_cannot_keep_examples_apart_is_padded_with_a_warning():
    model = tiny("bloom", torch.float32)
    data = [ADD] * 4
    with pytest.warns(UserWarning, match="padded instead of packed"):
        rows = prepare_examples(model, word_tokenizer(), data, RecoverySettings(seq_len=60))
    assert len(rows) == 4
    assert len(prepare_examples(tiny_llama(), word_tokenizer(), data, RecoverySettings(seq_len=60))) == 1


def test_instruction_files(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({**ADD, "output": str(n)}) for n in range(9)) + "\n\n")
    assert [row["output"] for row in load_instructions(lines)] == [str(n) for n in range(9)]
    assert len(load_instructions(lines, limit=4)) == 4
    drawn = [row["output"] for row in load_instructions(lines, limit=4, seed=1)]
    assert drawn == [row["output"] for row in load_instructions(lines, seed=1)][:4]
    assert drawn != ["0", "1", "2", "3"]
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps({"version": 1, "data": [ADD]}))
    assert load_instructions(whole) == [ADD]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", '{"question": "x", "answer": "y"}', "row 0 of .* has question, answer"),
        ("a.json", '{"a": 1}', "must be a list of objects"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[3]", "row 0 of .* has int"),
    ],
)
def test_unusable_instruction_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecoveryError, match=message):
        load_instructions(tmp_path / name)


def test_sources_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RecoveryError, match="cannot read"):
        load_instructions(tmp_path / "none.jsonl")
    with pytest.raises(RecoveryError, match="'alpaca'"):
        load_instructions("alpacca")


def test_alpaca_comes_from_the_hub_by_its_usual_name(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [ADD, {**ADD, "output": "2"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_instructions("alpaca")[0] == ADD
    assert load_instructions("someone/set", split="test", limit=1) == [ADD]
    assert asked == [(ALPACA, "train"), ("someone/set", "test")]

    def refuse(name, split):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(AssetError, match=r"no network.*self_generated"):
        load_instructions("alpaca")


def test_the_seed_prompts_are_many_varied_and_well_formed():
    rows = load_seed_prompts()
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) >= 200
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert len({row["subject"] for row in rows}) >= 20
    assert len({row["form"] for row in rows}) >= 10
    assert len({prompt.split()[0] for prompt in prompts}) >= 40
    assert all(prompt[0].isupper() and prompt == prompt.strip() and len(prompt) >= 20 for prompt in prompts)
    triples = [
        {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        for words in (p.lower().split() for p in prompts)
    ]
    alike = [
        (prompts[i], prompts[j])
        for i in range(len(triples))
        for j in range(i)
        if len(triples[i] & triples[j]) / max(1, len(triples[i] | triples[j])) > 0.5
    ]
    assert alike == []


def writer():
    model = tiny_llama()
    model.generation_config.eos_token_id = IDS["</s>"]
    return model


ASKED = ["Add 2", "Add 3", "Add 5 2", "2 3 5"]
HOW = SelfGeneration(num_examples=6, max_new_tokens=12, batch_size=3, temperature=2.0)


def wide_tokenizer():
    """A word for each of the model's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *(f"word{n}." for n in range(VOCABULARY - len(WORDS)))]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>")


def test_self_generated_data_is_deterministic_and_usable(tmp_path):
    model, tokenizer = writer(), wide_tokenizer()
    before, state = snapshot(model), torch.get_rng_state()
    rows = generate_instructions(
        model, tokenizer, tmp_path / "a.jsonl", settings=HOW, prompts=ASKED, progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(model), before)
    assert len(rows) == 6
    assert len({row["output"] for row in rows}) == 6
    assert all(row["instruction"] in ASKED and len(row["output"]) >= 12 for row in rows)
    assert load_instructions(tmp_path / "a.jsonl") == rows
    again = generate_instructions(
        model, tokenizer, tmp_path / "b.jsonl", settings=HOW, prompts=ASKED, progress=False
    )
    assert again == rows
    other = SelfGeneration(**{**vars(HOW), "seed": 1})
    different = generate_instructions(
        model, tokenizer, tmp_path / "c.jsonl", settings=other, prompts=ASKED, progress=False
    )
    assert different != rows
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.{end}" for name in "abc" for end in ("how.json", "jsonl")
    )
    result = recover(model, tokenizer, rows, settings=RecoverySettings(**QUICK), progress=False)
    assert len(result.losses) == 6


def test_self_generation_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    model, tokenizer = writer(), wide_tokenizer()
    whole = generate_instructions(
        model, tokenizer, tmp_path / "a.jsonl", settings=HOW, prompts=ASKED, progress=False
    )
    real, calls = model.generate, []

    def counted(**arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(**arguments)

    monkeypatch.setattr(model, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        generate_instructions(
            model, tokenizer, tmp_path / "b.jsonl", settings=HOW, prompts=ASKED, progress=False
        )
    assert not (tmp_path / "b.jsonl").exists()
    resumed = generate_instructions(
        model, tokenizer, tmp_path / "b.jsonl", settings=HOW, prompts=ASKED, progress=False
    )
    assert resumed == whole
    before = len(calls)
    assert (
        generate_instructions(
            model, tokenizer, tmp_path / "b.jsonl", settings=HOW, prompts=ASKED, progress=False
        )
        == whole
    )
    assert len(calls) == before, "a finished file is read, not made again"


def test_the_sieve_says_why_it_drops():
    sieve = _Sieve()
    good = "Rust forms when iron meets water and air. It flakes off."
    assert sieve.keep("a", good, True) == good
    assert sieve.keep("a", good.replace("flakes", "peels"), True) is None
    assert sieve.keep("b", good.upper(), True) is None
    assert sieve.keep("b", good.replace("flakes", "peels"), True) is not None, (
        "another prompt may say the like"
    )
    assert sieve.keep("b", "Yes.", True) is None
    assert sieve.keep("b", "This is odd: \ufffd\ufffd\ufffd\ufffd.", True) is None
    assert sieve.keep("b", "and so on and on " * 20, True) is None
    assert sieve.keep("b", "It never ends and", False) is None
    assert (
        sieve.keep("c", "The first sentence stands. The second does n", False) == "The first sentence stands."
    )
    assert sieve.dropped == {
        "said before": 2, "short": 1, "garbled": 1, "repeats itself": 1, "unfinished": 1,
    }  # fmt: skip


def test_self_generation_that_cannot_be_done_is_refused(tmp_path):
    model, tokenizer = writer(), wide_tokenizer()
    with pytest.raises(RecoveryError, match="no prompts"):
        generate_instructions(model, tokenizer, tmp_path / "a.jsonl", prompts=[], progress=False)
    greedy = SelfGeneration(num_examples=6, max_new_tokens=12, batch_size=3, temperature=1e-6)
    with pytest.raises(RecoveryError, match=r"only \d of 6 answers were good after 7 batches.*said before"):
        generate_instructions(
            model, tokenizer, tmp_path / "a.jsonl", settings=greedy, prompts=["Add 2"], progress=False
        )
    for changes in ({"num_examples": 0}, {"temperature": 0}, {"top_p": 1.5}, {"seed": -1}):
        with pytest.raises(RecoveryError):
            SelfGeneration(**changes)


def test_the_command_writes_the_file_and_says_where(tmp_path, capsys):
    model, tokenizer = writer(), wide_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--output", str(tmp_path / "out.jsonl"), "--num-examples", "5", "--max-new-tokens", "8"]
    assert main([*arguments, "--batch-size", "8", "--temperature", "2.0"]) == 0
    assert "5 answers" in capsys.readouterr().out
    assert len(load_instructions(tmp_path / "out.jsonl")) == 5
    assert main(["--model", str(tmp_path / "none")]) == 1
    assert "error:" in capsys.readouterr().err
