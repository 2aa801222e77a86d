"""Run an exported file in llama.cpp, to check it against the model it was made from.

Needs the package ``xllamacpp``, which brings llama.cpp itself; nothing else of the library does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from pruner_lib.checkpoint.errors import CheckpointError

_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_ALL = 1 << 20  # tokens, more than any vocabulary has
_CERTAIN = 1e4  # added to a token's logit, so that it is the one that is drawn


class LlamaCpp:
    """A GGUF file opened in llama.cpp on the CPU; token ids in, token ids and log-probabilities out.

    llama.cpp runs in a process of its own, since a file it cannot handle may end its process.

    >>> runner = LlamaCpp(export_gguf(model, tokenizer, "pruned.gguf"))
    >>> runner.greedy([504, 2365, 282, 4649, 314], 8)
    >>> runner.perplexity(windows)

    Args:
        path: the file.
        context: tokens that the cache can hold.
        threads: that compute. On a busy machine take one: llama.cpp's threads wait for each other spinning.
        exact_cache: keep keys and values in f32 instead of llama.cpp's f16, and do without flash attention.

    Raises:
        CheckpointError: no such file, ``xllamacpp`` is not installed, or llama.cpp refuses the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, context: int = 512, threads: int = 1, exact_cache: bool = True
    ) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"no GGUF file at {path}; write one with export_gguf")
        self._complete_token: int | None = None  # one whose text ends with a whole character
        request = {"path": os.path.abspath(path), "context": context, "threads": threads,
                   "exact_cache": exact_cache}  # fmt: skip
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, encoding="utf-8",
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else a failed check starts a debugger
        )  # fmt: skip
        self._end = weakref.finalize(self, _stop, self._process, self._log)
        problem = self._read()
        if "missing" in problem:
            self.close()
            raise CheckpointError(
                "running a GGUF file needs llama.cpp: pip install xllamacpp (the `test` extra brings it)"
            )
        if problem:
            reason = self._last_words()
            self.close()
            raise CheckpointError(f"llama.cpp cannot open {path}: {reason or problem['error']}")

    def close(self) -> None:
        """End llama.cpp's process; it also ends with this object."""
        self._end()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the tokenizer in the file, special tokens read and added as it says."""
        answer = self._ask({"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in answer.get("tokens", ())]

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, each given all before it; special ones are kept."""
        row = [int(token) for token in tokens]
        for _ in range(count):
            row.append(next(iter(self._most_likely(row, 1))))
        return row[len(tokens) :]

    def log_probability(self, tokens: Sequence[int], following: int) -> float:
        """log p(following | tokens), natural logarithm, from the raw logits."""
        drawn = self._draw(tokens, following)
        if drawn is not None:
            return float(drawn["logprob"])
        return self._most_likely(tokens, _ALL)[following]

    def perplexity(self, windows: Tensor | Iterable[Sequence[int]]) -> float:
        """exp of the mean −log p(x_t | x_1 … x_{t−1}), t = 2 … L, over windows that do not see each other.

        The same number as :func:`pruner_lib.perplexity` on the same windows, up to rounding. One token
        is computed at a time (about 10 ms at 135M parameters on one core), so keep windows few.

        Args:
            windows: token ids ``[W, L]``.

        Raises:
            CheckpointError: no window of two tokens.
        """
        rows = windows.tolist() if isinstance(windows, Tensor) else [list(row) for row in windows]
        found = [-self.log_probability(row[:end], row[end]) for row in rows for end in range(1, len(row))]
        if not found:
            raise CheckpointError("perplexity needs at least one window of two tokens")
        return math.exp(math.fsum(found) / len(found))

    def _most_likely(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        """Token id to log p of the likeliest next tokens, likeliest first."""
        if self._complete_token is None:
            self._complete_token = next((t for t in range(2000) if self._draw(tokens, t) is not None), None)
        drawn = None if self._complete_token is None else self._draw(tokens, self._complete_token, count)
        if drawn is None:
            raise CheckpointError("llama.cpp shows no probabilities for this vocabulary")
        return {int(entry["id"]): float(entry["logprob"]) for entry in drawn["top_logprobs"]}

    def _draw(self, tokens: Sequence[int], following: int, count: int = 1) -> dict[str, Any] | None:
        """Have one token drawn and return what llama.cpp tells of it.

        None for a token that it tells nothing of: one that ends within a character, or the text.
        """
        request = {
            "prompt": [int(token) for token in tokens], "n_predict": 1, "temperature": 0.0,
            "n_probs": count, "cache_prompt": True, "logit_bias": [[int(following), _CERTAIN]],
        }  # fmt: skip
        answer = self._ask(request)
        if "choices" not in answer:
            raise CheckpointError(f"llama.cpp did not answer: {answer}")
        content: list[dict[str, Any]] = (answer["choices"][0]["logprobs"] or {}).get("content") or []
        return content[0] if content and content[0]["id"] == following else None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # reading tells that the process has ended
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # it is a pipe
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise CheckpointError(f"llama.cpp ended with code {code}: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        """The errors among what llama.cpp printed last."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        telling = [line for line in lines if " E " in line or "ASSERT" in line]
        return "; ".join(" ".join(line.split()[2:]) for line in telling[:2])


def _stop(process: subprocess.Popen[str], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        with contextlib.suppress(OSError):
            stream.close()  # type: ignore[union-attr]
