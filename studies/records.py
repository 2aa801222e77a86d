"""What a study has measured so far: one JSON file that is committed, so that any run can be gone on with."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pruner_lib.assets.devices import computes_in_bfloat16
from pruner_lib.assets.files import write_whole


class OtherSettings(ValueError):
    """The file holds figures that were taken with other settings."""


class Records:
    """Results by the names of their cases, all taken with the same settings.

    Args:
        path: the file; need not exist.
        settings: what every figure in it was taken with.

    Raises:
        OtherSettings: the file was begun with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            other = [
                f"{key} {known['settings'].get(key)!r}, now {value!r}"
                for key, value in self.settings.items()
                if known["settings"].get(key) != value
            ]
            if other:
                raise OtherSettings(
                    f"{path} was begun with {'; '.join(other)}. Figures of both do not compare: give the "
                    "same settings, or another file with --records."
                )
            self._found = known["records"]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep a result, in the file too."""
        self._found[name] = {**record, "machine": machine()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": self.settings, "records": self._found}, indent=1, ensure_ascii=False)
        write_whole(self.path, text + "\n")


def machine() -> str:
    """What minutes depend on: threads, and whether products run in bfloat16."""
    precision = "bfloat16" if computes_in_bfloat16(torch.device("cpu")) else "float32"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, products in {precision}"
