"""Write docs/architectures.md: what discovery finds in each tiny model, and what becomes of a cut.

python tests/architectures.py            # from the repository's root; about a minute
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from plain import PLAIN
from torch import nn
from zoo import CONFIGURATIONS, MORE, NAMES, tiny

from pruner_lib.checkpoint import CheckpointError
from pruner_lib.checkpoint.checks import check_saveable
from pruner_lib.discovery import DependencyMap, GroupFamily, discover
from pruner_lib.pruning import PruningError, PruningPlan, prune
from pruner_lib.pruning.slicing import meta_copy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
BY_CONFIGURATION, IN_MEMORY, REFUSED = "yes", "yes, in memory", "refused"
HEAD = """# What discovery finds, architecture by architecture

Written by `python tests/architectures.py`; a test fails when it is no longer true. Nothing in the library
knows any of these names. Every row that says *yes* is cut at random by `tests/test_cut_equals_zeroed.py`,
which compares the logits with those of the zeroed model, and then generates, trains, saves and reloads:
`make test` does so for the architectures that differ most, the second part for one kind of each;
`make exhaustive` does it for every row.

The models are tiny (two layers) and random. *Groups* is their number per family. *yes* means that the cut
model saves, and opens with `from_pretrained` (with `pruner_lib` imported where layers differ). *yes, in
memory* means that the model's configuration has no entry for the new size, or that it has no configuration:
the cut model runs, generates and trains, and its weights go into a file and from there into the same cut of
a new model, but `save_pruned` refuses it. *refused*: the weights could be cut, but a number in the model's
code does not follow, so `prune` refuses and says so. The last column says why a family is blocked.
"""


def one_each(family: GroupFamily) -> list[int]:
    """The first group; of families in parts the first of every part."""
    if family.partition is None:
        return [0]
    return [int(np.flatnonzero(family.partition == part)[0]) for part in np.unique(family.partition)]


def can_lose(family: GroupFamily) -> bool:
    parts = 1 if family.partition is None else len(np.unique(family.partition))
    return family.cuttable and family.size - parts >= max(family.at_least, parts)


def opens(model: nn.Module, dependencies: DependencyMap, kind: str) -> str:
    """What becomes of a cut of one group of each family of the kind."""
    removal = {f.name: one_each(f) for f in dependencies.select(kind=kind) if can_lose(f)}
    try:
        cut = prune(model, PruningPlan.from_removal(dependencies, removal))
    except PruningError:
        return REFUSED
    try:
        check_saveable(cut, weights=False)
    except CheckpointError:
        return IN_MEMORY
    return BY_CONFIGURATION


def rows(dependencies: DependencyMap) -> Iterator[tuple[str, str, str, str | None]]:
    """``(kind, groups, layers, reason)``, families that differ only in their layer together."""
    merged: dict[tuple[str, int, str | None], list[int | None]] = {}
    for family in dependencies.families:
        reason = None if family.blocked is None else re.sub(r"\.\d+\.", ".*.", family.blocked)
        reason = reason and re.sub(r"\.\d+(?=[\s,)])", ".*", reason)
        merged.setdefault((family.kind, family.size, reason), []).append(family.layer)
    for (kind, size, reason), layers in merged.items():
        known = sorted({layer for layer in layers if layer is not None})
        where = ", ".join(map(str, known)) if known else "all"
        times = len(layers) // max(len(known), 1)
        yield kind, f"{times} × {size}" if times > 1 else str(size), where, reason


def section(name: str) -> str:
    model = meta_copy(tiny(name))
    dependencies = discover(model)
    lines = [f"\n## {name}\n", "| kind | groups | layers | cut | why not |", "|---|---|---|---|---|"]
    known: dict[str, str] = {}
    for kind, groups, layers, reason in rows(dependencies):
        if reason is None and kind not in known:
            known[kind] = opens(model, dependencies, kind)
        cut = "no" if reason else known[kind]
        lines.append(f"| {kind} | {groups} | {layers} | {cut} | {reason or ''} |")
    return "\n".join(lines)


def page() -> str:
    assert set(NAMES) == {*CONFIGURATIONS, *MORE, *PLAIN}
    return HEAD + "\n".join(section(name) for name in NAMES) + "\n"


def read_page() -> dict[str, list[tuple[str, str, str, str, str]]]:
    """The rows of the committed page by architecture."""
    found: dict[str, list[tuple[str, str, str, str, str]]] = {}
    name = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            name = line[3:]
            found[name] = []
        elif line.startswith("| ") and name and not line.startswith("| kind"):
            found[name].append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(NAMES)} architectures in {PAGE.name}")
