"""Training examples, token by token."""

import json

import pytest
import torch
from gguf_tokenizers import sentence_pieces
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pruner_lib.recovery import RecoveryError, format_chat, format_instruction, instruction_prompt
from pruner_lib.recovery.data import collate, make_examples

WORDS = ["<s>", "</s>", "<unk>", "###", "Instruction:", "Input:", "Response:", "Add", "them.", "2", "3", "5"]
IDS = {word: number for number, word in enumerate(WORDS)}
ADD = {"instruction": "Add them.", "input": "2 3", "output": "5"}


def word_tokenizer(bos=False, **special):
    """One token per word between spaces; with ``bos`` it begins texts with <s>, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        special["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **special})


def test_one_example_token_by_token():
    example = format_instruction(word_tokenizer(), ADD, seq_len=64)
    expected = [
        ("###", False), ("Instruction:", False), ("Add", False), ("them.", False),
        ("###", False), ("Input:", False), ("2", False), ("3", False),
        ("###", False), ("Response:", False),
        ("5", True), ("</s>", True),
    ]  # fmt: skip
    assert example.input_ids.tolist() == [IDS[word] for word, _ in expected]
    assert example.labels.tolist() == [IDS[word] if learnt else -100 for word, learnt in expected]
    assert example.num_predicted == 2


def test_the_prompt_as_text():
    assert instruction_prompt(ADD) == "### Instruction:\nAdd them.\n\n### Input:\n2 3\n\n### Response:\n"
    assert "### Input" not in instruction_prompt({**ADD, "input": " "})
    assert "### Input" not in instruction_prompt({"instruction": "Add them.", "output": "5"})


def test_bos_stands_where_the_tokenizer_puts_it():
    plain = format_instruction(word_tokenizer(), ADD, seq_len=64)
    example = format_instruction(word_tokenizer(bos=True), ADD, seq_len=64)
    assert example.input_ids.tolist() == [IDS["<s>"], *plain.input_ids.tolist()]
    assert example.labels.tolist() == [-100, *plain.labels.tolist()]


def test_the_cut_off_takes_the_end_away():
    example = format_instruction(word_tokenizer(), ADD, seq_len=11)
    assert example.input_ids[-1] == IDS["5"]
    assert example.num_predicted == 1


def test_examples_whose_response_is_cut_off_are_left_out():
    long = {**ADD, "instruction": "Add " * 50}
    assert len(make_examples(word_tokenizer(), [long, ADD, long], seq_len=20)) == 1
    with pytest.raises(RecoveryError, match=r"all tokens are masked.*2 examples.*cut-off of 20"):
        make_examples(word_tokenizer(), [long, long], seq_len=20)


@pytest.mark.parametrize(
    ("item", "missing"),
    [
        ({"instruction": "Add them.", "input": "2 3"}, "output"),
        ({**ADD, "output": "  "}, "output"),
        ({**ADD, "output": None}, "output"),
        ({"input": "2", "output": "5"}, "instruction"),
    ],
)
def test_an_example_without_response_or_instruction_is_named(item, missing):
    with pytest.raises(RecoveryError, match=f"example 1 has no {missing}"):
        make_examples(word_tokenizer(), [ADD, item], seq_len=64)


def test_instructions_need_an_end_token_and_a_tokenizer():
    with pytest.raises(RecoveryError, match="EOS"):
        make_examples(word_tokenizer(eos_token=None), [ADD], seq_len=64)
    with pytest.raises(RecoveryError, match="tokenizer"):
        make_examples(None, [ADD], seq_len=64)


def test_text_is_packed_without_padding_or_special_tokens():
    examples = make_examples(word_tokenizer(bos=True), "2 3 5 2 3 5 2", seq_len=3)
    assert [example.input_ids.tolist() for example in examples] == [[9, 10, 11], [9, 10, 11]]
    assert [example.labels.tolist() for example in examples] == [[-100, 10, 11], [-100, 10, 11]]
    with pytest.raises(RecoveryError, match="7 tokens, too few for one window of 8"):
        make_examples(word_tokenizer(), "2 3 5 2 3 5 2", seq_len=8)


def test_token_ids_are_taken_row_by_row():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    examples = make_examples(None, ids, seq_len=128)
    assert [example.labels.tolist() for example in examples] == [[-100, 2, 3], [-100, 5, 6]]
    examples[0].input_ids[0] = 9
    examples[0].labels[1] = 9
    assert ids[0, 1] == 2


def test_batches_are_padded_on_the_right_and_padding_is_masked():
    tokenizer = word_tokenizer()
    short = {**ADD, "input": ""}
    batch = collate(make_examples(tokenizer, [ADD, short], seq_len=64), pad_token=1)
    assert batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"].sum(1).tolist() == [12, 8]
    assert batch["input_ids"][1, 8:].tolist() == [1] * 4
    assert batch["labels"][1, 8:].tolist() == [-100] * 4
    assert batch["labels"][1, 6:8].tolist() == [IDS["5"], IDS["</s>"]]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_text_beside_instructions_is_left_alone(template):
    """tatsu-lab/alpaca holds prompt and answer once more in a column of that name."""
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    plain = make_examples(tokenizer, [ADD, ADD], seq_len=64, template=template)
    beside = make_examples(tokenizer, [{**ADD, "text": "Add them. 2 3 5"}] * 2, seq_len=64, template=template)
    assert [row.labels.tolist() for row in beside] == [row.labels.tolist() for row in plain]
    turns = [{"role": "user", "content": "2"}, {"role": "assistant", "content": "5"}]
    chat = make_examples(tokenizer, [{"messages": turns, "text": "2 3 5"}], seq_len=2)
    assert [row.labels.tolist() for row in chat] == [[-100, IDS["5"]]]


def test_text_whose_other_columns_are_empty_is_text():
    rows = [{"text": "2 3", "instruction": None, "output": None, "messages": None}] * 2
    assert [row.input_ids.tolist() for row in make_examples(word_tokenizer(), rows, seq_len=3)] == [
        [9, 10, 1]
    ] * 2


def space_marking(scheme):
    """SentencePiece's kind; "Prepend" as older conversions have it, else transformers' own Metaspace."""
    pieces = sentence_pieces()
    document = json.loads(pieces.backend_tokenizer.to_str())
    if scheme != "Prepend":
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False,
        }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}",
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["Prepend", "first", "always"])
def test_no_space_is_learnt_that_the_text_has_not(scheme):
    """Tokenised by itself, an answer would begin with the space that these tokenizers put before a text."""
    tokenizer = space_marking(scheme)
    item = {"instruction": "the cat", "output": "sat there"}
    example = format_instruction(tokenizer, item, seq_len=512)
    whole = tokenizer(instruction_prompt(item) + item["output"], add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(example.input_ids[example.labels != -100]) == "sat there</s>"
    said = (("user", "the cat"), ("assistant", "sat"), ("user", "and"), ("assistant", " the other"))
    turns = [{"role": role, "content": text} for role, text in said]
    chat = format_chat(tokenizer, turns, seq_len=512)
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
    assert chat.input_ids.tolist() == whole["input_ids"]
