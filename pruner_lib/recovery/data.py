"""Training examples: packed text, token ids, or instructions whose prompt is masked out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"  # how tokenizers that came from SentencePiece write a space

TrainingData = str | Tensor | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence to learn from.

    Attributes:
        input_ids: token ids ``[L]``.
        labels: the same ids, or −100 where the token is not to be predicted; the first always is,
            as nothing comes before it.
        positions: of each token in its own example ``[L]`` when several share the row (each begins
            again at 0), else None.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_predicted(self) -> int:
        """Tokens that take part in the loss."""
        return int((self.labels != IGNORED).sum())


def make_examples(
    tokenizer: PreTrainedTokenizerBase | None, data: TrainingData, *, seq_len: int, template: str = "alpaca"
) -> list[Example]:
    """Examples from any kind of data.

    A string is tokenised whole, without special tokens, and packed into windows of ``seq_len``; what
    is left at the end is dropped. Rows ``{"text": …}`` become one such string of tokens, each row
    ended by EOS. Token ids ``[N, L]`` are taken row by row as they are. Instructions in Alpaca's format
    (:func:`format_instruction`) and conversations ``{"messages": [{"role", "content"}, …]}``
    (:func:`format_chat`) become one example each; those whose response lies wholly behind the
    cut-off are left out. A ``text`` beside them (Alpaca's holds prompt and answer as one) is left alone.

    Args:
        tokenizer: the model's own; may be None for token ids.
        data: text, ids, or dicts of one of the three forms.
        seq_len: window of packed text, cut-off of instructions.
        template: ``"alpaca"``, or ``"chat"`` to write instructions as the tokenizer's own template does.

    Raises:
        RecoveryError: no data, too little for one window, another kind of data, an instruction without
            response, nothing left to predict.
    """
    if isinstance(data, str):
        return _windows(_packed_text(tokenizer, data), seq_len)
    if isinstance(data, Tensor):
        return [_plain(row) for row in _checked_ids(data)]
    if not isinstance(data, Sequence) or not all(isinstance(item, Mapping) for item in data):
        raise RecoveryError(
            "data must be a text, token ids [N, L], or a list of dicts with instruction, input and output, "
            f"with messages, or with text; got {_kind(data)}"
        )
    if not data:
        raise RecoveryError("data is an empty list; give at least one instruction with its output")
    if tokenizer is None:
        raise RecoveryError("instructions need the model's tokenizer; got None")
    items: list[Any] = list(data)
    if all(isinstance(item.get("text"), str) for item in items) and not any(map(_has_response, items)):
        return _windows(_joined_rows(tokenizer, items), seq_len)
    examples = [_format(tokenizer, item, template, seq_len=seq_len, number=i) for i, item in enumerate(items)]
    usable = [example for example in examples if example.num_predicted]
    if not usable:
        raise RecoveryError(
            f"all tokens are masked: in each of the {len(data)} examples the prompt alone fills the cut-off "
            f"of {seq_len} tokens, so no response is left to learn from; raise seq_len"
        )
    return usable


def _has_response(item: Mapping[str, Any]) -> bool:
    """Whether a row says apart what is asked and what is answered; a column that is None says nothing."""
    asked = item.get("instruction") is not None and item.get("output") is not None
    return asked or item.get("messages") is not None


def _format(
    tokenizer: PreTrainedTokenizerBase, item: Mapping[str, Any], template: str, *, seq_len: int, number: int
) -> Example:
    if "messages" in item:
        return format_chat(tokenizer, item["messages"], seq_len=seq_len, number=number)
    if template == "chat":
        _require_parts(item, number)
        extra = (item.get("input") or "").strip()
        asked = "\n\n".join([item["instruction"].strip(), *([extra] if extra else [])])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": item["output"].strip()}]
        return format_chat(tokenizer, turns, seq_len=seq_len, number=number)
    return format_instruction(tokenizer, item, seq_len=seq_len, number=number)


def instruction_prompt(item: Mapping[str, Any]) -> str:
    """What the model reads before it answers.

    >>> instruction_prompt({"instruction": "Name a colour.", "output": "Blue."})
    '### Instruction:\\nName a colour.\\n\\n### Response:\\n'
    """
    parts = [f"### Instruction:\n{item['instruction'].strip()}\n\n"]
    if (item.get("input") or "").strip():
        parts.append(f"### Input:\n{item['input'].strip()}\n\n")
    return "".join([*parts, "### Response:\n"])


def format_instruction(
    tokenizer: PreTrainedTokenizerBase, item: Mapping[str, Any], *, seq_len: int, number: int = 0
) -> Example:
    """One instruction: prompt masked with −100, then the response and EOS, which are learnt.

        input_ids   [BOS] prompt …            response … EOS
        labels       -100   -100 -100 -100    response … EOS

    BOS stands only where the tokenizer itself would put it. Prompt and response are tokenised
    apart, as in generation, so the border is exact. What goes beyond ``seq_len`` is cut off.

    Args:
        tokenizer: needs an EOS token.
        item: ``instruction``, ``output``, and perhaps ``input``.
        seq_len: cut-off in tokens.
        number: position in the data, for the message.

    Raises:
        RecoveryError: no instruction, no response, no EOS token.
    """
    _require_parts(item, number)
    if tokenizer.eos_token_id is None:
        raise RecoveryError("the tokenizer has no EOS token, so a response could not be ended; set eos_token")
    prompt = [*_leading_tokens(tokenizer), *_encode(tokenizer, instruction_prompt(item))]
    said = _encode(tokenizer, item["output"].strip(), behind=instruction_prompt(item))
    response = [*said, tokenizer.eos_token_id]
    ids = torch.tensor((prompt + response)[:seq_len], dtype=torch.long)
    labels = ids.clone()
    labels[: max(1, len(prompt))] = IGNORED
    return Example(ids, labels)


def _require_parts(item: Mapping[str, Any], number: int) -> None:
    for key in ("instruction", "output"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise RecoveryError(
                f"example {number} has no {key}: {_shorten(dict(item))}; every example needs an instruction "
                "and an output that are not empty"
            )


def format_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Any, *, seq_len: int, number: int = 0
) -> Example:
    """One conversation in the tokenizer's chat template; only what the assistant says is learnt.

    The text up to each of its turns, the header of the turn included, is masked; the turn and the mark
    that ends it are learnt. The pieces are tokenised apart, as in generation.

    Args:
        tokenizer: needs a chat template that writes a conversation's beginning the same whatever follows.
        messages: ``{"role": …, "content": …}`` in order, at least one by the assistant.
        seq_len: cut-off in tokens.
        number: position in the data, for the message.

    Raises:
        RecoveryError: no template, no assistant's turn, a turn without content, another form.
    """
    turns = _checked_messages(messages, number)
    if not getattr(tokenizer, "chat_template", None):
        raise RecoveryError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or give instructions and "
            'template="alpaca"'
        )
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        for learnt, upto, header in ((False, place, True), (True, place + 1, False)):
            text: Any = tokenizer.apply_chat_template(
                turns[:upto], tokenize=False, add_generation_prompt=header
            )
            if not text.startswith(written):
                raise RecoveryError(
                    f"the chat template rewrites earlier turns of example {number} when a later one follows, "
                    "so what the assistant said cannot be told apart; split the conversation"
                )
            piece = _encode(tokenizer, text[len(written) :], behind=written)
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
            written = text
    labels[0] = IGNORED
    return Example(torch.tensor(ids[:seq_len]), torch.tensor(labels[:seq_len]))


def _checked_messages(messages: Any, number: int) -> list[dict[str, str]]:
    well_formed = isinstance(messages, Sequence) and all(
        isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        for turn in messages
    )
    if not well_formed or not messages:
        raise RecoveryError(
            f"example {number}: messages must be a list of {{'role': …, 'content': …}}, got "
            f"{_shorten(messages)}"
        )
    said = [turn for turn in messages if turn["role"] == "assistant"]
    if not said or not all(turn["content"].strip() for turn in said):
        raise RecoveryError(
            f"example {number} has no response: {_shorten(messages)}; a conversation needs a turn of the "
            "assistant, and none of its turns may be empty"
        )
    return [dict(turn) for turn in messages]


def collate(examples: Sequence[Example], pad_token: int) -> dict[str, Tensor]:
    """A batch padded on the right to its longest example; padding is masked everywhere.

    Rows that several examples share carry ``position_ids``, which begin again at each, and no mask: the
    models of transformers read from them that examples must not see each other. Rows of one length
    need no mask either.
    """
    longest = max(len(example) for example in examples)
    shape = (len(examples), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    lengths = torch.tensor([len(example) for example in examples])
    if any(example.positions is not None for example in examples):
        # Padding is one more example, which begins at position 0.
        batch["position_ids"] = (torch.arange(longest) - lengths[:, None]).expand(shape).clone()
    elif bool((lengths < longest).any()):
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    for row, example in enumerate(examples):
        length = len(example)
        batch["input_ids"][row, :length] = example.input_ids
        batch["labels"][row, :length] = example.labels
        if "position_ids" in batch:
            positions = torch.arange(length) if example.positions is None else example.positions
            batch["position_ids"][row, :length] = positions
    return batch


def _plain(row: Tensor) -> Example:
    labels = row.clone()
    labels[0] = IGNORED
    return Example(row, labels)


def _windows(ids: list[int], seq_len: int) -> list[Example]:
    count = len(ids) // seq_len
    if count == 0:
        raise RecoveryError(
            f"the text has {len(ids)} tokens, too few for one window of {seq_len}; give more or lower seq_len"
        )
    rows = torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)
    return [_plain(row) for row in rows]


def _joined_rows(tokenizer: PreTrainedTokenizerBase, items: Sequence[Mapping[str, Any]]) -> list[int]:
    """Every row's tokens and EOS after it."""
    empty = [number for number, item in enumerate(items) if not item["text"].strip()]
    if empty:
        raise RecoveryError(f"example {empty[0]} has an empty text; leave such rows out")
    if tokenizer.eos_token_id is None:
        raise RecoveryError("the tokenizer has no EOS token, so texts could not be kept apart; set eos_token")
    return [
        token for item in items for token in (*_encode(tokenizer, item["text"]), int(tokenizer.eos_token_id))
    ]


def _packed_text(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[int]:
    if not text.strip():
        raise RecoveryError("the text is empty; give some, for example load_text('wikitext2', 'train')")
    if tokenizer is None:
        raise RecoveryError("a text needs the model's tokenizer; give it, or give token ids [N, L]")
    return _encode(tokenizer, text)


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        raise RecoveryError(
            f"token ids must be integers [N, L] with L ≥ 2; got {ids.dtype} {list(ids.shape)}"
        )
    if not len(ids):
        raise RecoveryError(f"data is empty: token ids of shape {list(ids.shape)}")
    return ids.detach().to("cpu", torch.long)


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if this tokenizer begins its texts with it."""
    start = tokenizer("a")["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, behind: str = "") -> list[int]:
    """Tokens of a text; of one ``behind`` another without the space that some tokenizers begin texts with."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first: Any = tokenizer.convert_ids_to_tokens(ids[:1]) if behind else []
    if first and str(first[0]).startswith(_SPACE):
        before, whole = _encode(tokenizer, behind), _encode(tokenizer, behind + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return ids


def _kind(data: Any) -> str:
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return f"a list that holds {', '.join(sorted({type(item).__name__ for item in data}))}"
    return type(data).__name__


def _shorten(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 120 else text[:117] + "…"
