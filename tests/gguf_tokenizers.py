"""Small tokenizers of the two kinds that GGUF knows, trained on a sentence."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat and the other cat sat there too",
    "  two  spaces, 12 é 漢 🙂\tand\nmore ",
]


def sentence_pieces(prefix: bool = True, every_split: bool = True) -> PreTrainedTokenizerFast:
    """BPE with bytes to fall back on, as converted from SentencePiece: a pair for every split of a token."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=40, show_progress=False)
    trained.train_from_iterator([SENTENCES[0]] * 4, trainer)
    document = json.loads(trained.to_str())
    learned = ["".join(pair) for pair in document["model"]["merges"]]
    letters = sorted({letter for token in document["model"]["vocab"] for letter in token})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *learned]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    splits = ((token[:cut], token[cut:]) for token in learned for cut in range(1, len(token)))
    merges = [pair for pair in splits if set(pair) <= set(vocabulary)]
    kept = merges if every_split else merges[::2]
    pieces = Tokenizer(models.BPE(vocabulary, kept, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    pieces.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )  # fmt: skip


def byte_level(splitter: Any = None) -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator(["the cat sat on the mat and the other cat sat there too"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template="{{ messages }}",
    )  # fmt: skip
