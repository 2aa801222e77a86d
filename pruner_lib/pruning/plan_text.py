"""How a plan prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruner_lib.pruning.costs import Cost
    from pruner_lib.pruning.plan import PruningPlan

_MOST_ROWS = 6  # of one kind; a global plan may leave another number in every layer


def plan_as_text(plan: PruningPlan, dense: Cost | None = None) -> str:
    """A compact table of what goes.

    Args:
        plan: any plan.
        dense: the cost of the dense model, to be compared; None leaves costs out.
    """
    before, after = plan.params_before, plan.params_after
    share = 100 * (before - after) / before if before else 0.0
    lines = [f"PruningPlan: {before:,} -> {after:,} parameters ({share:.1f} % removed)"]
    if dense is not None:
        lines.append(_compared(dense, plan.cost()))
    if plan.dropped:
        lines.append(f"  dropped whole: {dropped_in_words(plan)}")
    rows = _rows(plan)
    if rows:
        wide = max(8, *(2 + len(kept) for _, _, _, kept, _ in rows))
        wider = max(9, *(2 + len(gone) for *_, gone in rows))
        lines.append(f"  {'kind':<16}{'layers':<16}{'groups':>8}{'kept':>{wide}}{'removed':>{wider}}")
        lines += [
            f"  {kind:<16}{at:<16}{size:>8,}{kept:>{wide}}{gone:>{wider}}"
            for kind, at, size, kept, gone in rows
        ]
    elif not plan.dropped:
        lines.append("  (nothing is removed)")
    return "\n".join(lines)


def dropped_in_words(plan: PruningPlan) -> str:
    """What goes whole: ``"layers 13-23; attention of layers 2, 5"``."""
    numbers: dict[str, list[int | None]] = {}
    for unit in plan.dropped:
        parts = unit.split(".")
        numbers.setdefault(parts[2] if len(parts) > 2 else "", []).append(int(parts[1]))
    words = []
    for inside, layers in numbers.items():
        noun = "layer" if len(layers) == 1 else "layers"
        words.append(f"{f'{inside} of ' if inside else ''}{noun} {_ranges(layers)}")
    return "; ".join(words)


def _rows(plan: PruningPlan) -> list[tuple[str, str, int, str, str]]:
    """Kind, layers, groups, kept, removed; one row per number kept, or one per kind where they are many."""
    layers: dict[tuple[str, int], dict[int, list[int | None]]] = {}
    for family in plan.dependencies.families:
        if family.name in plan.removal:
            by_kept = layers.setdefault((family.kind, family.size), {})
            by_kept.setdefault(plan.kept_sizes[family.name], []).append(family.layer)
    rows = []
    for (kind, size), by_kept in layers.items():
        if len(by_kept) <= _MOST_ROWS:
            rows += [
                (kind, _ranges(at), size, f"{kept:,}", f"{size - kept:,}") for kept, at in by_kept.items()
            ]
            continue
        least, most = min(by_kept), max(by_kept)
        everywhere = _ranges(layer for at in by_kept.values() for layer in at)
        rows.append((kind, everywhere, size, f"{least:,}-{most:,}", f"{size - most:,}-{size - least:,}"))
    return rows


def _compared(dense: Cost, cut: Cost) -> str:
    """One line: multiply-accumulates, weights and KV cache, before and after."""
    parts = [
        f"{dense.macs / 1e9:,.2f} -> {cut.macs / 1e9:,.2f} G multiply-accumulates at {cut.batch_size} × "
        f"{cut.seq_len} tokens",
        f"{dense.weight_bytes / 2**20:,.1f} -> {cut.weight_bytes / 2**20:,.1f} MiB of weights",
    ]
    if dense.kv_cache_bytes_per_token is not None:
        parts.append(
            f"{dense.kv_cache_bytes_per_token:,} -> {cut.kv_cache_bytes_per_token:,} bytes of cache a token"
        )
    return "  " + ", ".join(parts)


def _ranges(layers: Iterable[int | None]) -> str:
    """``[4, 5, 6, 9]`` as ``"4-6, 9"``; families that span layers as ``"all"``."""
    numbers = sorted(layer for layer in layers if layer is not None)
    if not numbers:
        return "all"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[-1] > run[0] else str(run[0]) for run in runs)
