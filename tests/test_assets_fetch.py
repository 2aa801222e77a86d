"""The manifest, and files taken from wheels by the real pip out of a folder, without a network."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pruner_lib.assets import (
    ChecksumError,
    DownloadError,
    UnknownAssetError,
    cache_folder,
    fetch,
    fetching,
    load_manifest,
    workspace,
)
from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.files import replace_folder, temporary_folder
from pruner_lib.assets.manifest import Asset, Manifest, read_manifest

PACKAGE = "pruner-lab-test-package"
CONTENT = {"greeting": b"good day", "farewell": b"good night"}


def asset(name: str, content: bytes) -> Asset:
    return Asset(
        name,
        PACKAGE,
        "1.0",
        f"inside/{name}.txt",
        len(content),
        hashlib.sha256(content).hexdigest(),
        "CC0",
        "test",
    )


@pytest.fixture
def manifest() -> Manifest:
    return Manifest({name: asset(name, content) for name, content in CONTENT.items()}, {PACKAGE: 1000})


def write_wheel(folder: Path, content: dict[str, bytes]) -> Path:
    """A pure wheel whose code would betray itself by leaving a file if it were ever run."""
    stem = PACKAGE.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    files = {f"inside/{name}.txt": data for name, data in content.items()}
    files["inside/__init__.py"] = b"open('was-run', 'w').close()"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n".encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/RECORD"] = b""
    wheel = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty cache, and pip looking into one folder only."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def leftovers() -> list[Path]:
    return [
        path for path in cache_folder().rglob("*") if ".incomplete-" in path.name or path.suffix == ".whl"
    ]


def test_fetch_takes_the_file_and_its_neighbours_without_running_the_package(
    index, manifest, monkeypatch, tmp_path
):
    write_wheel(index, CONTENT)
    monkeypatch.chdir(tmp_path)
    path = fetch("greeting", manifest=manifest)
    assert path.read_bytes() == b"good day"
    assert (cache_folder() / manifest["farewell"].location).read_bytes() == b"good night"
    assert not (tmp_path / "was-run").exists()
    assert leftovers() == []


def test_second_fetch_runs_no_pip(index, manifest, monkeypatch):
    write_wheel(index, CONTENT)
    first = fetch("greeting", manifest=manifest)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was run again"))
    assert fetch("greeting", manifest=manifest) == first
    assert fetch("farewell", manifest=manifest).read_bytes() == b"good night"


def test_empty_cache_and_no_network_says_what_to_do(index, manifest):
    with pytest.raises(
        DownloadError, match=r"'greeting' is not in the cache .* pip could not download"
    ) as caught:
        fetch("greeting", manifest=manifest)
    assert f"{PACKAGE}==1.0" in str(caught.value)
    assert "PRUNER_LIB_CACHE" in str(caught.value)
    assert leftovers() == []


def test_missing_pip_is_named(index, manifest, monkeypatch):
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch("greeting", manifest=manifest)


def test_altered_download_is_refused_and_the_good_copy_stays(index, manifest):
    wheel = write_wheel(index, CONTENT)
    good = fetch("greeting", manifest=manifest)
    wheel.unlink()
    write_wheel(index, {**CONTENT, "greeting": b"bad day!"})
    with pytest.raises(ChecksumError, match="altered or cut short"):
        fetch("greeting", refresh=True, manifest=manifest)
    assert good.read_bytes() == b"good day"
    assert leftovers() == []


def test_truncated_wheel_is_refused_and_the_good_copy_stays(index, manifest, monkeypatch, tmp_path):
    wheel = write_wheel(index, CONTENT)
    good = fetch("greeting", manifest=manifest)
    cut = tmp_path / wheel.name
    cut.write_bytes(wheel.read_bytes()[:-200])
    monkeypatch.setattr(fetching, "_download", lambda *_: cut)
    with pytest.raises(ChecksumError, match="damaged"):
        fetch("greeting", refresh=True, manifest=manifest)
    assert good.read_bytes() == b"good day"


def test_wheel_without_the_file_is_refused(index, manifest):
    write_wheel(index, {"farewell": CONTENT["farewell"]})
    with pytest.raises(ChecksumError, match=r"lacks 'inside/greeting\.txt'"):
        fetch("greeting", manifest=manifest)


def test_an_altered_neighbour_does_not_keep_the_asked_file_away(index, manifest):
    write_wheel(index, {**CONTENT, "farewell": b"goodnight!"})
    with pytest.raises(ChecksumError, match="'farewell'"):
        fetch("greeting", manifest=manifest)
    assert fetch("greeting", manifest=manifest).read_bytes() == b"good day"


@pytest.mark.parametrize("damaged", [b"good", b"bad day!"], ids=["truncated", "altered"])
def test_damaged_cached_copy_is_replaced(index, manifest, damaged):
    write_wheel(index, CONTENT)
    path = fetch("greeting", manifest=manifest)
    path.write_bytes(damaged)
    assert fetch("greeting", manifest=manifest).read_bytes() == b"good day"


def test_full_disk_leaves_no_part_and_says_so(index, manifest, monkeypatch):
    write_wheel(index, CONTENT)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Full() if self.name == "part" else real(self, *a, **k)
    )
    with pytest.raises(AssetError, match="Free some space"):
        fetch("greeting", manifest=manifest)
    monkeypatch.undo()
    assert leftovers() == []


def test_unknown_name_lists_the_valid_ones_and_the_nearest(manifest):
    with pytest.raises(
        UnknownAssetError, match=r"Did you mean 'greeting'\? The manifest has: greeting, farewell"
    ):
        fetch("greetings", manifest=manifest)


def test_own_manifest_is_complete():
    manifest = load_manifest()
    tasks = {"boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"}
    texts = {
        "books",
        "c4",
        "code",
        "wiki",
        "tiny",
        *(f"wikitext2/{split}" for split in ("train", "validation", "test")),
    }
    assert {"SmolLM2-135M-Instruct", *tasks, *texts} <= set(manifest.assets)
    for entry in manifest.assets.values():
        assert entry.license and entry.purpose and manifest.wheel_bytes[entry.package] > 0
    assert manifest["SmolLM2-135M-Instruct"].sha256.startswith("b179c952")


def test_one_package_has_one_version():
    versions: dict[str, set[str]] = {}
    for entry in load_manifest().assets.values():
        versions.setdefault(entry.package, set()).add(entry.version)
    assert all(len(found) == 1 for found in versions.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "abc"}, "64 hexadecimal"),
        ({"bytes": 0}, "positive"),
        ({"file": "../outside"}, "inside the wheel"),
        ({"file": "/etc/passwd"}, "inside the wheel"),
    ],
)
def test_entries_that_cannot_be_verified_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(asset("greeting", b"good day"), **change)


def test_manifest_refuses_other_schemas_and_repeated_names(tmp_path):
    file = tmp_path / "manifest.json"
    entry = dataclasses.asdict(asset("greeting", b"good day"))
    file.write_text(json.dumps({"schema": 2, "packages": {}, "assets": []}))
    with pytest.raises(ValueError, match="schema 2"):
        read_manifest(file)
    file.write_text(json.dumps({"schema": 1, "packages": {}, "assets": [entry, entry]}))
    with pytest.raises(ValueError, match="occurs twice"):
        read_manifest(file)


def test_workspace_is_the_same_folder_for_the_same_name_and_never_outside(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    one = workspace("owner/model")
    assert one == workspace("owner/model") and one.is_dir()
    assert workspace("SmolLM2-135M-Instruct").name == "SmolLM2-135M-Instruct"
    for name in ("../../outside", "/absolute", "a\\b", "..", "~/x"):
        assert workspace(name).resolve().parent == (tmp_path / "cache" / "work").resolve()
    with pytest.raises(ValueError, match="empty"):
        workspace("  ")


def test_workspaces_of_two_folders_with_one_name_differ(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    places = [tmp_path / parent / "pruned" for parent in ("a", "b")]
    for place in places:
        place.mkdir(parents=True)
    assert len({workspace(str(place)) for place in places}) == 2
    monkeypatch.chdir(tmp_path / "a")
    assert workspace("./pruned") == workspace(str(places[0]))


def test_replace_folder_replaces_whole_and_temporary_folder_cleans_up(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with temporary_folder(target) as parent:
            (parent / "part").mkdir()
            (parent / "part" / "file").write_text(content)
            replace_folder(parent / "part", target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    old, new = tmp_path / "model", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = os.replace

    def full_disk(source, target):
        if source == new:
            raise OSError(errno.ENOSPC, "no space left")
        rename(source, target)

    monkeypatch.setattr("pruner_lib.assets.files.os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace_folder(new, old)
    assert (old / "name").read_text() == "model"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new"}
