"""Training examples: packed text, token ids, or instructions whose prompt is masked out of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruner_lib.recovery.errors import RecoveryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that takes no part in the loss

TrainingData = str | Tensor | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        input_ids: token ids ``[L]``.
        labels: the same ids, or −100 where the token is not to be predicted; the first always is,
            as nothing comes before it.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def num_predicted(self) -> int:
        """Tokens that take part in the loss."""
        return int((self.labels != IGNORED).sum())


def make_examples(
    tokenizer: PreTrainedTokenizerBase | None, data: TrainingData, *, seq_len: int
) -> list[Example]:
    """Examples from any of the three kinds of data.

    A string is tokenised whole, without special tokens, and packed into windows of ``seq_len``; what
    is left at the end is dropped. Token ids ``[N, L]`` are taken row by row as they are. Instructions
    in Alpaca's format become one example each (:func:`format_instruction`); those whose response
    lies wholly behind the cut-off are left out.

    Args:
        tokenizer: the model's own; may be None for token ids.
        data: text, ids, or dicts with ``instruction``, ``output`` and perhaps ``input``.
        seq_len: window of packed text, cut-off of instructions.

    Raises:
        RecoveryError: no data, too little for one window, another kind of data, an instruction without
            response, nothing left to predict.
    """
    if isinstance(data, str):
        rows = _packed_text(tokenizer, data, seq_len)
        return [_plain(row) for row in rows]
    if isinstance(data, Tensor):
        return [_plain(row) for row in _checked_ids(data)]
    if not isinstance(data, Sequence) or not all(isinstance(item, Mapping) for item in data):
        raise RecoveryError(
            "data must be a text, token ids [N, L], or a list of dicts with instruction, input and output; "
            f"got {_kind(data)}"
        )
    if not data:
        raise RecoveryError("data is an empty list; give at least one instruction with its output")
    if tokenizer is None:
        raise RecoveryError("instructions need the model's tokenizer; got None")
    items: list[Any] = list(data)
    examples = [
        format_instruction(tokenizer, item, seq_len=seq_len, number=i) for i, item in enumerate(items)
    ]
    usable = [example for example in examples if example.num_predicted]
    if not usable:
        raise RecoveryError(
            f"all tokens are masked: in each of the {len(data)} examples the prompt alone fills the cut-off "
            "of "
            f"{seq_len} tokens, so no response is left to learn from; raise seq_len"
        )
    return usable


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
    for key in ("instruction", "output"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise RecoveryError(
                f"example {number} has no {key}: {_shorten(dict(item))}; every example needs an instruction "
                "and "
                "an output that are not empty"
            )
    if tokenizer.eos_token_id is None:
        raise RecoveryError("the tokenizer has no EOS token, so a response could not be ended; set eos_token")
    prompt = [*_leading_tokens(tokenizer), *_encode(tokenizer, instruction_prompt(item))]
    response = [*_encode(tokenizer, item["output"].strip()), tokenizer.eos_token_id]
    ids = torch.tensor((prompt + response)[:seq_len], dtype=torch.long)
    labels = ids.clone()
    labels[: max(1, len(prompt))] = IGNORED
    return Example(ids, labels)


def collate(examples: Sequence[Example], pad_token: int) -> dict[str, Tensor]:
    """A batch padded on the right to its longest example; padding is masked everywhere."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = example.input_ids
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = example.labels
    return batch


def _plain(row: Tensor) -> Example:
    labels = row.clone()
    labels[0] = IGNORED
    return Example(row, labels)


def _packed_text(tokenizer: PreTrainedTokenizerBase | None, text: str, seq_len: int) -> Tensor:
    if not text.strip():
        raise RecoveryError("the text is empty; give some, for example load_text('wikitext2', 'train')")
    if tokenizer is None:
        raise RecoveryError("a text needs the model's tokenizer; give it, or give token ids [N, L]")
    ids = _encode(tokenizer, text)
    count = len(ids) // seq_len
    if count == 0:
        raise RecoveryError(
            f"the text has {len(ids)} tokens, too few for one window of {seq_len}; give more or lower seq_len"
        )
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _kind(data: Any) -> str:
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return f"a list that holds {', '.join(sorted({type(item).__name__ for item in data}))}"
    return type(data).__name__


def _shorten(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 120 else text[:117] + "…"
