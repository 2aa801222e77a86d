"""What a study has measured so far: one JSON file that is committed, so that any run can be gone on with."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from pruner_lib.assets import AssetError
from pruner_lib.assets.devices import computes_in_bfloat16
from pruner_lib.assets.files import write_whole


class Named(Protocol):
    """A case: what it is called is where its result is kept."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


class Records:
    """Results by the names of their cases, all taken with the same settings.

    Args:
        path: the file; need not exist.
        settings: what every figure in it was taken with.

    Raises:
        ValueError: the file was begun with other settings.
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
                raise ValueError(
                    f"{path} was begun with {'; '.join(other)}. Figures of both do not compare: give the "
                    "same settings, or another file with --records."
                )
            self._found = known["records"]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._found[name]

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep a result, in the file too."""
        self._found[name] = {**record, "machine": machine()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": self.settings, "records": self._found}, indent=1, ensure_ascii=False)
        write_whole(self.path, text + "\n")

    def complete(
        self,
        cases: Sequence[C],
        run_case: Callable[[C], dict[str, Any]],
        write_page: Callable[[list[dict[str, Any]]], None],
        only: str = "",
    ) -> list[dict[str, Any]]:
        """Run the cases that are missing, in order, and write the page after each.

        Args:
            cases: all of the study.
            run_case: measures one; one whose data cannot be had is left out.
            write_page: is given what there is, in the order of the cases.
            only: an expression that the names of the cases to run match.
        """
        wanted = [case for case in cases if re.search(only, case.name)]
        for number, case in enumerate(wanted, start=1):
            if case.name not in self:
                print(f"[{number}/{len(wanted)}] {case.name}", flush=True)
                try:
                    self.add(case.name, run_case(case))
                except AssetError as error:
                    print(f"  left out: {error}", flush=True)
                    continue
                print(f"  perplexity {self[case.name]['perplexity']}", flush=True)
                write_page([self[case.name] for case in cases if case.name in self])
        found = [self[case.name] for case in cases if case.name in self]
        write_page(found)
        return found


def study_parser(text: str, folder: str, defaults: Any, **options: type) -> argparse.ArgumentParser:
    """The command line of a study: where it is kept, on what it runs, which cases, and its own options.

    Args:
        text: what the study is.
        folder: of its records and its page.
        defaults: has an attribute for each option.
        options: name to type.
    """
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=how)
    parser.add_argument("--records", type=Path, default=Path(folder, "records.json"))
    parser.add_argument("--page", type=Path, default=Path(folder, "study.md"))
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--only", default="", help="cases whose names match this expression")
    for name, kind in options.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=getattr(defaults, name), help="(default: %(default)s)")
    return parser


def machine() -> str:
    """What minutes depend on: threads, and whether products run in bfloat16."""
    precision = "bfloat16" if computes_in_bfloat16(torch.device("cpu")) else "float32"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, products in {precision}"
