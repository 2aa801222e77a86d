"""A tokenizer in the words of GGUF."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Chain

from pruner_lib.checkpoint.errors import CheckpointError

# Text on which splitters that llama.cpp tells apart give different pieces.
_PROBE = (
    "It's 12345 o'CLOCK, 'Twas  3.14\t007 x1y22  9\n\n  Ünïcode's ½ ２３ \r\n"
    "(a)==[b]!!  www.x.org/?q=1 \n 漢字かな 4th  \n\n\n end 'RE we'LL   tail   "
    "हिन्दी में e\u0301a\u0308 "  # marks are no letters
)
_SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NEVER = -1e9  # a score below all others
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's name for the kind: ``gpt2`` is byte-level BPE, ``llama`` is SentencePiece's BPE.
        tokens: by id, as many as the embedding has rows.
        types: of each, a ``gguf.TokenType``.
        merges: pairs in order of rank, ``"Ġ t"``; of byte-level BPE alone.
        scores: of the tokens, the higher the sooner merged; of SentencePiece alone.
        pre: llama.cpp's name for the rule that splits text before merging.
        space_prefix: whether a space goes before every text.
        special: ``bos``, ``eos``, ``unk``, ``pad`` … to token ids.
        add_bos: whether BOS goes before every text.
        add_eos: whether EOS goes after it.
        chat_template: Jinja text, or several by name, or None.
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    pre: str
    space_prefix: bool
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | Sequence[Mapping[str, str]] | None

    def write(self, writer: GGUFWriter) -> None:
        """Put everything into a GGUF file's key-value part."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int, end: int | None = None) -> Vocabulary:
    """Read a transformers tokenizer.

    Args:
        tokenizer: a fast one (with a ``tokenizers`` backend) of the byte-level BPE kind (GPT-2, Llama 3,
            Qwen, SmolLM …) or converted from SentencePiece's BPE (Llama 2, Mistral, Gemma …).
        rows: of the model's embedding; ids without a token become unused ones.
        end: token that ends a text, where the tokenizer does not say.

    Warns:
        UserWarning: texts of a kind that llama.cpp splits otherwise, with the reason.

    Raises:
        CheckpointError: a tokenizer of another kind, one whose splitting llama.cpp has no name for, one
            that puts other tokens around a text than BOS and EOS, one without a token that ends a
            text, or one with more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"cannot write a {type(tokenizer).__name__} to GGUF: it has no `tokenizers` backend; "
            "load the fast tokenizer of the model with AutoTokenizer"
        )
    document = json.loads(backend.to_str())
    kind = _kind(document)
    tokens, types = _tokens(document, rows)
    special = _special(tokenizer, end)
    first, last = _ends(tokenizer, special)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
             for pair in document["model"]["merges"]]  # fmt: skip
    pieces = kind == "llama"
    _warn_of_differences(document)
    return Vocabulary(
        model=kind,
        tokens=tokens,
        types=_piece_types(tokens, types, special.get("unk")) if pieces else types,
        merges=() if pieces else tuple(" ".join(pair) for pair in pairs),
        scores=merge_scores(tokens, pairs, types) if pieces else (),
        pre="default" if pieces else _splitter(backend.pre_tokenizer, document["model"]),
        space_prefix=pieces and backend.encode("a", add_special_tokens=False).tokens[0].startswith(_SPACE),
        special=special,
        add_bos=bool(first),
        add_eos=bool(last),
        chat_template=template,
    )


def _special(tokenizer: Any, end: int | None) -> dict[str, int]:
    """Ids of BOS, EOS, UNK …; llama.cpp takes token 11 for the end of a text where a file says none."""
    special = {
        name: int(index)
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    if end is not None:
        special.setdefault("eos", end)
    if "eos" not in special:
        raise CheckpointError(
            "cannot write this tokenizer to GGUF: neither it nor the model says which token ends a text. Set "
            "tokenizer.eos_token or model.generation_config.eos_token_id"
        )
    return special


def _warn_of_differences(document: Mapping[str, Any]) -> None:
    """Say what llama.cpp's files have no word for and its users can live with."""
    stripping = [token["content"] for token in document.get("added_tokens", ())
                 if token.get("lstrip") or token.get("rstrip") or token.get("single_word")]  # fmt: skip
    composed = (document.get("normalizer") or {}).get("type") == "NFC"
    splitter = document.get("pre_tokenizer") or {}
    once = splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme") != "never"
    found = {
        "a text that begins with a space, or follows a special token, gets one more or less": once,
        "letters written as a base and a mark are not composed first (NFC)": composed,
        f"{', '.join(stripping[:3])} {'does' if len(stripping) == 1 else 'do'} not look at what stands "
        "beside them": bool(stripping),
    }
    words = [word for word, applies in found.items() if applies]
    if words:
        warnings.warn(
            f"llama.cpp splits some texts into other tokens than this tokenizer: {'; '.join(words)}",
            UserWarning,
            stacklevel=4,
        )


def _kind(document: Mapping[str, Any]) -> str:
    """llama.cpp's name for the kind of tokenizer."""
    model, decoder = document["model"], (document.get("decoder") or {}).get("type")
    normalizer = document.get("normalizer") or {}
    if model["type"] == "BPE" and decoder == "ByteLevel" and normalizer.get("type") in (None, "NFC"):
        return "gpt2"
    if model["type"] == "BPE" and model.get("byte_fallback") and _only_marks_spaces(document):
        absent = [token for byte in range(256) if (token := f"<0x{byte:02X}>") not in model["vocab"]]
        if absent:
            raise CheckpointError(
                f"cannot write this tokenizer to GGUF: it has no token {absent[0]} ({len(absent)} of the 256 "
                "bytes are missing), without which llama.cpp stops at characters that it does not know"
            )
        return "llama"
    raise CheckpointError(
        "cannot write this tokenizer to GGUF: byte-level BPE and SentencePiece's BPE are supported, this one "
        f"is {model['type']} with the decoder {decoder} and the normaliser {normalizer.get('type')}. Save "
        "the checkpoint with save_pruned and use llama.cpp's own converter on it"
    )


def _only_marks_spaces(document: Mapping[str, Any]) -> bool:
    """True when text is changed in nothing but spaces, and not split before merging."""
    normalizer, splitter = document.get("normalizer"), document.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    plain = all(
        step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        or step == {"type": "Prepend", "prepend": _SPACE}
        for step in steps
    )
    if splitter is None:
        return plain and bool(steps)
    if splitter["type"] == "Metaspace":
        return not steps and not splitter.get("split", True) and splitter.get("replacement") == _SPACE
    # Gemma's: no space is left to split at.
    return plain and bool(steps) and splitter["type"] == "Split" and splitter["pattern"] == {"String": " "}


def merge_scores(
    tokens: Sequence[str], pairs: Iterable[tuple[str, ...]], types: Sequence[int] = ()
) -> tuple[float, ...]:
    """A score per token that makes SentencePiece merge in the order of a list of pairs.

    SentencePiece joins the two neighbours whose joint token has the highest score, in whatever way the
    token is split; so the list must hold every split of a token into two tokens, one after the other,
    which holds for lists that were made from a SentencePiece model.

    Args:
        tokens: by id.
        pairs: in the order in which they are joined.
        types: of the tokens; only ordinary ones are joined. All are, if not given.

    Raises:
        CheckpointError: the list lacks a split, or joins other tokens between two splits of one.
    """
    listed = [pair for pair in pairs if len(pair) == 2]
    ranks: dict[str, int] = {}
    last = ""
    for rank, (first, second) in enumerate(listed):
        token = first + second
        if token in ranks and token != last:
            raise CheckpointError(
                f"cannot write this tokenizer to GGUF: between two ways to join its token {token!r} it joins "
                f"{last!r}, and llama.cpp has one rank per token. Use llama.cpp's own converter on the "
                "checkpoint"
            )
        ranks.setdefault(token, rank)
        last = token
    known, ordered = set(listed), list(tokens)
    vocabulary = set(ordered)
    plain = [token for token, kind in zip(ordered, types or [1] * len(ordered), strict=True)
             if kind == int(TokenType.NORMAL) and not _BYTE.fullmatch(token)]  # fmt: skip
    for token in dict.fromkeys((*ranks, *plain)):
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in vocabulary and second in vocabulary and (first, second) not in known:
                raise CheckpointError(
                    f"cannot write this tokenizer to GGUF: it never joins {first!r} and {second!r} to its "
                    f"token {token!r}, llama.cpp would. Use llama.cpp's own converter on the checkpoint"
                )
    return tuple(float(-ranks[token]) if token in ranks else _NEVER for token in ordered)


def _piece_types(tokens: Sequence[str], types: Sequence[int], unknown: int | None) -> tuple[int, ...]:
    """Types of SentencePiece: bytes and the unknown token are told apart from the others."""
    found = [int(TokenType.BYTE) if _BYTE.fullmatch(token) else kind
             for token, kind in zip(tokens, types, strict=True)]  # fmt: skip
    if unknown is not None:
        found[unknown] = int(TokenType.UNKNOWN)
    return tuple(found)


def _tokens(document: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    named_so = {
        *document["model"]["vocab"],
        *(added["content"] for added in document.get("added_tokens", ())),
    }
    tokens = [
        name if (name := f"[UNUSED{i}]") not in named_so else f"[UNUSED{i} OF {rows}]" for i in range(rows)
    ]
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


def _ends(tokenizer: Any, special: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """What the tokenizer puts around a text by itself: nothing or BOS, nothing or EOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    first, last = full[:start], full[start + len(bare) :]
    if first not in ([], [special.get("bos")]) or last not in ([], [special["eos"]]):
        raise CheckpointError(
            f"cannot write this tokenizer to GGUF: it puts the tokens {first} before and {last} after a "
            f"text, llama.cpp only BOS ({special.get('bos')}) and EOS ({special['eos']}). Set its "
            "post_processor so"
        )
    return first, last


@cache
def _known_splitters() -> tuple[tuple[str, PreTokenizer], ...]:
    """llama.cpp's names for splitting rules, with a splitter that does the same."""

    def split_by(*patterns: str) -> PreTokenizer:
        pieces = Split(Regex("|".join(patterns)), "isolated")
        return Chain([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])

    plain = ByteLevel(add_prefix_space=False, use_regex=True)
    return (
        ("gpt-2", plain),
        ("smollm", Chain([Digits(individual_digits=True), plain])),
        ("llama-bpe", split_by(_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),
        ("qwen2", split_by(_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),
    )


def _splitter(found: Any, model: Mapping[str, Any]) -> str:
    whole = bool(model.get("ignore_merges"))  # takes a piece that is a token as it is, merges or not
    if found is not None:
        pieces = found.pre_tokenize_str(_PROBE)
        for name, known in _known_splitters():
            if known.pre_tokenize_str(_PROBE) == pieces and whole == (name == "llama-bpe"):
                return name
    names = ", ".join(name for name, _ in _known_splitters())
    raise CheckpointError(
        f"cannot write this tokenizer to GGUF: it splits text as none of llama.cpp's rules {names} does, and "
        "a wrong rule would give other tokens. Save the checkpoint with save_pruned and use llama.cpp's own "
        "converter on it"
    )
