"""The cache folder, and writing into it whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """The folder that ``PRUNER_LIB_CACHE`` names, or ``~/.cache/pruner_lib``; made when missing."""
    named = os.environ.get("PRUNER_LIB_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "pruner_lib"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def workspace(model_name: str) -> Path:
    """Folder below the cache where the notebooks keep what they make from one model.

    Args:
        model_name: the name given to :func:`load_model`. A folder is known by its full path, so
            ``./pruned`` in two places gives two workspaces.

    Returns:
        An existing folder, the same for the same name: ``<cache>/work/SmolLM2-135M-Instruct``.
    """
    if not model_name.strip():
        raise ValueError("the model's name is empty; give a name, a hub id or a folder")
    path = Path(model_name).expanduser()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", model_name).strip("-.") or "model"
    if path.is_dir():
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        readable = f"{re.sub(r'[^A-Za-z0-9._-]+', '--', path.resolve().name) or 'root'}-{digest}"
    folder = cache_folder() / "work" / readable
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A sibling to write that takes the name of ``path`` when all went well, and is gone otherwise.

    So no reader sees half a file, and an old one at ``path`` stays whole.

    Args:
        path: the file to write or replace; its folder must exist.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it private; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> Path:
    """Write a text file, encoded as UTF-8, whole or not at all; see :func:`whole_file`.

    Returns:
        ``path``.

    Raises:
        OSError: the folder is missing or full; an old file at ``path`` is still whole.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder on the same file system as ``beside``, gone afterwards whatever happens."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Put ``source`` in the place of ``target`` in one step.

    A folder cannot be renamed over a filled one, so an old ``target`` is first renamed aside; when
    another process has just put the same folder there, its copy stays.
    """
    if target.exists():
        with temporary_folder(target) as aside:
            os.replace(target, aside / "old")
            try:
                os.replace(source, target)
            except BaseException:
                os.replace(aside / "old", target)
                raise
        return
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():
            raise
