"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a temporary sibling, then rename it over ``path``, so that no reader sees half a file.

    Args:
        path: the file to write or replace; its folder must exist.
        text: what it will hold, encoded as UTF-8.

    Returns:
        ``path``.

    Raises:
        OSError: the folder is missing or full; an old file at ``path`` is still whole.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
