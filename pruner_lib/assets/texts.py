"""Plain text by name: WikiText-2, calibration sources, a file, a data set of the hub."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pruner_lib.assets.errors import AssetError, UnknownAssetError, suggestion
from pruner_lib.assets.fetching import fetch

SPLITS = ("train", "validation", "test")
# Share of the characters at which each split of an unsplit source begins and ends.
_POSITIONS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_UNSPLIT = ("books", "c4", "code", "wiki", "tiny", "technical", "multilingual")


@dataclass(frozen=True)
class HubText:
    """A text data set on the hub.

    Attributes:
        path: the data set's id.
        config: its configuration, or None.
        column: the column that holds the text.
        revision: the branch; data sets that were scripts have their files on the parquet branch.
    """

    path: str
    config: str | None = None
    column: str = "text"
    revision: str | None = None


_PARQUET = "refs/convert/parquet"
HUB_TEXTS = MappingProxyType(
    {
        "ptb": HubText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", _PARQUET),
        "wikitext103": HubText("Salesforce/wikitext", "wikitext-103-raw-v1"),
    }
)
TEXT_SOURCES = ("wikitext2", *_UNSPLIT, *HUB_TEXTS)


def load_text(source: str | os.PathLike[str], split: str = "train") -> str:
    """The text of one split of one source.

    ``"wikitext2"`` has its official splits, raw (with the original words, no ``<unk>``), as the file
    stands. ``"books"``, ``"c4"``, ``"code"``, ``"wiki"``, ``"tiny"``, ``"technical"``,
    ``"multilingual"`` and text files have none, so they are cut by position: the first 80 % of the
    characters are ``train``, the next 10 % ``validation``, the last 10 % ``test``. ``"ptb"`` and
    ``"wikitext103"``, and any data set written ``owner/name`` or ``owner/name:configuration`` with a
    column ``text``, come from the hub; their rows are joined by line breaks.

    Args:
        source: a name of :data:`TEXT_SOURCES`, a path to a UTF-8 text file, or a hub id.
        split: ``"train"``, ``"validation"`` or ``"test"``; for a hub id any split it has.

    Returns:
        The text.

    Raises:
        UnknownAssetError: no such source, or no such split.
        DownloadError: the source is not in the cache and cannot be downloaded.
        AssetError: the hub's data set could not be loaded, or the file is not UTF-8.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name == "wikitext2":
        _check_split(name, split)
        with gzip.open(fetch(f"wikitext2/{split}"), "rt", encoding="utf-8", newline="") as stream:
            return stream.read()
    if name in _UNSPLIT:
        return _part(name, _read(fetch(name)), split)
    if name in HUB_TEXTS:
        return _from_hub(HUB_TEXTS[name], split)
    if path.is_file():
        return _part(name, _read(path), split)
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")) and not path.suffix:
        identifier, _, config = name.partition(":")
        return _from_hub(HubText(identifier, config or None), split)
    raise UnknownAssetError(
        f"no text is called {name!r} and no such file exists.{suggestion(name, TEXT_SOURCES)} "
        f"Valid: {', '.join(TEXT_SOURCES)}, a path to a text file, or a hub data set 'owner/name'."
    )


def _check_split(source: str, split: str) -> None:
    if split not in SPLITS:
        raise UnknownAssetError(
            f"{source!r} has no split {split!r}.{suggestion(split, SPLITS)} Valid: {', '.join(SPLITS)}."
        )


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise AssetError(f"{path} is not UTF-8 text ({error}); convert it first") from error


def _part(source: str, text: str, split: str) -> str:
    _check_split(source, split)
    start, stop = _POSITIONS[split]
    return text[round(start * len(text)) : round(stop * len(text))]


def _from_hub(text: HubText, split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise AssetError(
            f"{text.path!r} is a data set of the hub and needs the package `datasets`: "
            "pip install 'pruner-lab[evaluation]'"
        ) from error
    try:
        rows = load_dataset(text.path, text.config, split=split, revision=text.revision)
        return "\n".join(rows[text.column])
    # The hub, its client and the file readers each raise errors of their own.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AssetError(
            f"the hub's data set {text.path!r} (configuration {text.config!r}, split {split!r}, column "
            f"{text.column!r}) could not be loaded: {first} It needs the network or the hub's own cache; "
            f"without them use one of: wikitext2, {', '.join(_UNSPLIT)}, or a text file."
        ) from error
