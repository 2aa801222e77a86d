"""What a GGUF type costs: size of the file and perplexity in llama.cpp, beside the model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pruner_lib.checkpoint.gguf_export import export_gguf
from pruner_lib.checkpoint.llama_cpp import LlamaCpp


@dataclass(frozen=True)
class GgufQuality:
    """One type of file.

    Attributes:
        dtype: as given to :func:`export_gguf`.
        bytes: size of the file.
        perplexity: in llama.cpp, on the windows given.
        num_tokens: predicted tokens behind it.
    """

    dtype: str
    bytes: int
    perplexity: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.dtype:<5}{self.bytes / 2**20:>9,.1f} MiB  perplexity {self.perplexity:,.2f} "
            f"({self.num_tokens:,} tokens predicted, llama.cpp)"
        )


def measure_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    windows: Tensor,
    *,
    dtypes: Iterable[str] = ("f16", "q8_0", "q4_0"),
    threads: int = 1,
) -> tuple[GgufQuality, ...]:
    """Export a model in several types, and measure each in llama.cpp.

    Compare with ``perplexity(model, None, windows, seq_len=windows.shape[1])``: f16 agrees to about
    0.1 %, and what q8_0 and q4_0 add is the price of fewer bits, on top of what pruning cost.

    Args:
        model: as for :func:`export_gguf`.
        tokenizer: as for :func:`export_gguf`.
        windows: token ids ``[W, L]``; W (L - 1) tokens are predicted one by one, so take few.
        dtypes: as for :func:`export_gguf`.
        threads: of llama.cpp.

    Returns:
        One entry per dtype, in their order. The files are removed.

    Raises:
        CheckpointError: see :func:`export_gguf` and :class:`LlamaCpp`.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            path = export_gguf(model, tokenizer, Path(folder) / f"{dtype}.gguf", dtype=dtype)
            with LlamaCpp(path, context=max(64, windows.shape[1]), threads=threads) as runner:
                value = runner.perplexity(windows)
            tokens = windows.shape[0] * (windows.shape[1] - 1)
            found.append(GgufQuality(dtype, path.stat().st_size, value, tokens))
            path.unlink()
    return tuple(found)
