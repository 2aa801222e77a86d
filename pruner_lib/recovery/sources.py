"""Instructions to learn from: files, the hub's Alpaca set, and the seed prompts shipped with the library."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.manifest import manifest_path
from pruner_lib.recovery.errors import RecoveryError

ALPACA = "yahma/alpaca-cleaned"  # what LLM-Pruner recovers on
_NAMES = {"alpaca": ALPACA}


def load_instructions(
    source: str | os.PathLike[str] = "alpaca",
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Rows that ``recover`` takes as data.

    A row is an instruction (``instruction``, ``output`` and perhaps ``input``), a conversation
    (``messages``: a list of ``role`` and ``content``) or plain ``text``; other columns are left alone.

    >>> data = load_instructions("my_answers.jsonl")
    >>> data = load_instructions("alpaca", limit=2000, seed=0)  # 2,000 drawn from 51,760

    Args:
        source: a ``.jsonl`` file (one object a line), a ``.json`` file (a list of objects, or an object
            that holds one list), ``"alpaca"`` for :data:`ALPACA`, or any data set of the hub ``owner/name``.
        split: of a hub data set.
        limit: at most so many rows.
        seed: draw them at random; None takes the first.

    Raises:
        RecoveryError: no such file, one that is not JSON, empty, or with rows of another form.
        AssetError: the hub's data set could not be loaded.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.suffix in (".json", ".jsonl"):
        rows = _from_file(path)
    else:
        rows = _from_hub(_NAMES.get(name, name), split)
    if limit is not None and limit < 1:
        raise RecoveryError(f"limit must be at least 1, got {limit}")
    if not rows:
        raise RecoveryError(f"{name} is empty; give at least one instruction with its output")
    if seed is not None:
        random.Random(seed).shuffle(rows)
    rows = rows[:limit]
    for number, row in enumerate(rows):
        _check_form(name, number, row)
    return rows


def _check_form(name: str, number: int, row: Any) -> None:
    known = isinstance(row, Mapping) and (
        {"instruction", "output"} <= set(row) or "messages" in row or "text" in row
    )
    if not known:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise RecoveryError(
            f"row {number} of {name} has {found}; rows need instruction and output, or messages, or text. "
            "Rename the columns, or build the list of dicts yourself"
        )


def _from_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecoveryError(f"cannot read {path}: {error}") from error
    return _json_lines(path, text) if path.suffix == ".jsonl" else _json_list(path, text)


def _json_lines(path: Path, text: str) -> list[Any]:
    rows = []
    # JSON may hold U+2028 and its like as they are, at which splitlines would cut.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RecoveryError(f"{path}, line {number} is not JSON: {error}; one object a line") from error
    return rows


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecoveryError(
            f"{path} is not JSON: {error}; is it one object a line? Name it .jsonl"
        ) from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise RecoveryError(
            f"{path} holds a {type(content).__name__}; it must be a list of objects, or hold one"
        )
    return content


def _from_hub(identifier: str, split: str) -> list[Any]:
    if identifier.count("/") != 1 or not all(identifier.split("/")):
        raise RecoveryError(
            f"no instructions are called {identifier!r}; give a .json or .jsonl file, 'alpaca', or a data "
            "set of the hub 'owner/name'"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AssetError(
            f"{identifier!r} is a data set of the hub and needs the package `datasets`: "
            "pip install 'pruner-lab[evaluation]'"
        ) from error
    try:
        return [dict(row) for row in load_dataset(identifier, split=split)]
    # The hub, its client and the file readers each raise errors of their own.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AssetError(
            f"the hub's data set {identifier!r} (split {split!r}) could not be loaded: {first} It needs the "
            "network or the hub's own cache; without them let the dense model write its own data: "
            "python -m pruner_lib.recovery.self_generated"
        ) from error


def load_seed_prompts() -> list[dict[str, str]]:
    """The prompts shipped in ``data/seed_prompts.jsonl``: ``subject``, ``form`` and ``prompt`` of each."""
    rows: Sequence[Any] = _from_file(manifest_path().with_name("seed_prompts.jsonl"))
    return [dict(row) for row in rows]
