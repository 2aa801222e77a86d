"""A tokenizer in the words of GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from pruner_lib.checkpoint.errors import CheckpointError

# Text on which splitters that llama.cpp tells apart give different pieces.
_PROBE = (
    "It's 12345 o'CLOCK, 'Twas  3.14\t007 x1y22  9\n\n  Ünïcode's ½ ２３ \r\n"
    "(a)==[b]!!  www.x.org/?q=1 \n 漢字かな 4th  \n\n\n end 'RE we'LL   tail   "
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a byte-level BPE tokenizer.

    Attributes:
        tokens: by id, as many as the embedding has rows.
        types: of each, a ``gguf.TokenType``.
        merges: pairs in order of rank, ``"Ġ t"``.
        pre: llama.cpp's name for the rule that splits text before merging.
        special: ``bos``, ``eos``, ``unk``, ``pad`` … to token ids.
        add_bos: whether BOS goes before every text.
        add_eos: whether EOS goes after it.
        chat_template: Jinja text, or None.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Put everything into a GGUF file's key-value part."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a transformers tokenizer.

    Args:
        tokenizer: a fast one (with a ``tokenizers`` backend) of the byte-level BPE kind: GPT-2, Llama 3,
            Qwen, SmolLM …
        rows: of the model's embedding; ids without a token become unused ones.

    Raises:
        CheckpointError: a tokenizer of another kind, one whose splitting llama.cpp has no name for,
            or one with more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"cannot write a {type(tokenizer).__name__} to GGUF: it has no `tokenizers` backend; "
            "load the fast tokenizer of the model with AutoTokenizer"
        )
    document = json.loads(backend.to_str())
    _check_kind(document)
    tokens, types = _tokens(document, rows)
    first, last = _ends(tokenizer)
    special = {
        name: int(index)
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=tuple(
            pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]
        ),
        pre=_splitter(backend.pre_tokenizer),
        special=special,
        add_bos=first is not None and first == special.get("bos"),
        add_eos=last is not None and last == special.get("eos"),
        chat_template=template if isinstance(template, str) else None,
    )


def _check_kind(document: Mapping[str, Any]) -> None:
    kind = document["model"]["type"]
    byte_level = (document.get("decoder") or {}).get("type") == "ByteLevel"
    if kind != "BPE" or not byte_level or document.get("normalizer") not in (None, {"type": "NFC"}):
        raise CheckpointError(
            f"cannot write this tokenizer to GGUF: byte-level BPE is supported, this one is {kind} with the "
            f"decoder {(document.get('decoder') or {}).get('type')} and the normaliser "
            f"{(document.get('normalizer') or {}).get('type')}. Save the checkpoint with save_pruned and use "
            "llama.cpp's own converter on it"
        )


def _tokens(document: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[UNUSED{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    named = [(index, token, TokenType.NORMAL) for token, index in document["model"]["vocab"].items()]
    for added in document.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        named.append((added["id"], added["content"], kind))
    largest = max(index for index, _, _ in named)
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer does not belong to this model: it has token ids up to {largest}, the model's "
            f"embedding has {rows} rows"
        )
    for index, token, kind in named:
        tokens[index], types[index] = token, int(kind)
    return tuple(tokens), tuple(types)


def _ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """First and last token that the tokenizer puts around a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    rest = full[start + len(bare) :]
    return (full[0] if start else None), (rest[-1] if rest else None)


@cache
def _known_splitters() -> tuple[tuple[str, PreTokenizer], ...]:
    """llama.cpp's names for splitting rules, with a splitter that does the same."""

    def split_by(*patterns: str) -> PreTokenizer:
        pieces = Split(Regex("|".join(patterns)), "isolated")
        return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])

    plain = ByteLevel(add_prefix_space=False, use_regex=True)
    return (
        ("gpt-2", plain),
        ("smollm", Sequence([Digits(individual_digits=True), plain])),
        ("llama-bpe", split_by(_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),
        ("qwen2", split_by(_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),
    )


def _splitter(found: Any) -> str:
    if found is not None:
        pieces = found.pre_tokenize_str(_PROBE)
        for name, known in _known_splitters():
            if known.pre_tokenize_str(_PROBE) == pieces:
                return name
    names = ", ".join(name for name, _ in _known_splitters())
    raise CheckpointError(
        f"cannot write this tokenizer to GGUF: it splits text as none of llama.cpp's rules {names} does, and "
        "a wrong rule would give other tokens. Save the checkpoint with save_pruned and use llama.cpp's own "
        "converter on it"
    )
