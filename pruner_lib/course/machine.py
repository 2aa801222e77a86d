"""Will this machine do? Said in a few lines, before a class finds out."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from pruner_lib.assets import AssetError
from pruner_lib.assets.files import cache_folder
from pruner_lib.assets.manifest import load_manifest

LEAST_MEMORY = 4  # GiB: two copies of the default model in float32, activations and Jupyter
LEAST_DISK = 2  # GiB: packages' files, the converted model and what the notebooks keep


def machine_report() -> str:
    """Python, torch, cores, memory, disk and accelerator, each with what it means for the notebooks.

    Nothing is fetched and nothing is measured for long; a line that begins with ``!`` wants attention.
    """
    lines = [
        f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__}",
        f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}",
        memory_line(_memory()),
        _cache_line(),
        _accelerator_line(),
    ]
    return "\n".join(lines)


def memory_line(gibibytes: float | None) -> str:
    """What so much memory is good for; None where the system does not say."""
    if gibibytes is None:
        return f"memory unknown; {LEAST_MEMORY} GiB are enough for the default model"
    if gibibytes < LEAST_MEMORY:
        return (
            f"! {gibibytes:.1f} GiB of memory, {LEAST_MEMORY} are wanted: close other programs, and run one "
            "notebook at a time (Kernel, Shut Down)"
        )
    return f"{gibibytes:.0f} GiB of memory, enough"


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _cache_line() -> str:
    try:
        folder, assets = cache_folder(), load_manifest().assets
    except (AssetError, OSError) as error:
        return f"! the cache cannot be used: {error}"
    missing = sum(not (folder / asset.location).exists() for asset in assets.values())
    if not missing:
        return "all files of the course are in the cache"
    free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_DISK:
        return f"! {free:.1f} GiB free for the cache, {LEAST_DISK} are wanted; PRUNER_LIB_CACHE moves it"
    return f"{missing} of {len(assets)} files are still to be fetched, and there is room for them"


def _accelerator_line() -> str:
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    return "no GPU, and none needed"
