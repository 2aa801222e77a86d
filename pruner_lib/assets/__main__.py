"""``python -m pruner_lib.assets``: fill the cache once, so that later runs need no network."""

from __future__ import annotations

import sys

from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.fetching import fetch
from pruner_lib.assets.files import cache_folder
from pruner_lib.assets.manifest import load_manifest
from pruner_lib.assets.models import default_model_folder


def main() -> int:
    """Fetch every file of the manifest and convert the default model; 0 when all is there."""
    manifest = load_manifest()
    try:
        for name in manifest.assets:
            fetch(name)
        model = default_model_folder()
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(manifest.assets)} files and the model {model.name} are in {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
