"""The process in which llama.cpp runs; started by ``llama_cpp.py``, never imported.

llama.cpp ends its process when an internal check fails, so it gets one of its own. One JSON request per line
on standard input, one JSON answer per line on standard output; what llama.cpp itself prints goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any


def open_file(xllamacpp: Any, request: dict[str, Any]) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = request["path"]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = request["context"], 1, False, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    if request["exact_cache"]:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def tokenize(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The binding has no call for this; its server, which listens on this machine alone, has."""
    asked = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as found:
        answer: dict[str, Any] = json.load(found)
    return answer


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        import xllamacpp

        server = open_file(xllamacpp, json.loads(sys.argv[1]))
    except ImportError as error:
        return answer({"missing": str(error)})
    except Exception as error:  # the binding raises what llama.cpp throws
        return answer({"error": f"{error}"})
    answer({})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer(tokenize(server, request) if "content" in request else server.handle_completions(request))
        except Exception as error:  # as above
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
