"""Several short examples in one row, so that no token is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pruner_lib.importance.calibration import untouched
from pruner_lib.recovery.data import Example, collate

_TOLERANCE = 2e-2  # relative to the largest logit; a row that leaks differs by far more


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Put examples into rows of at most ``seq_len`` tokens, the longest first, each where it fits best.

    Example by example stays whole and keeps its own positions from 0, so a model that reads
    ``position_ids`` sees each as if it stood alone:

        input_ids   a a a a a | b b b | c c
        positions   0 1 2 3 4 | 0 1 2 | 0 1
        labels      – – a a a | – b b | – c       (what may attend to what: only within one example)

    Args:
        examples: none longer than ``seq_len``.
        seq_len: length of a row.

    Returns:
        The rows; one that holds a single example is that example.

    >>> [len(row) for row in pack([Example(torch.arange(n), torch.arange(n)) for n in (5, 3, 6, 2)], 8)]
    [8, 8]
    """
    rows: list[list[Example]] = []
    by_room: dict[int, list[list[Example]]] = {}
    for example in sorted(examples, key=len, reverse=True):
        room = next((left for left in range(len(example), seq_len) if by_room.get(left)), None)
        row = by_room[room].pop() if room is not None else []
        if room is None:
            rows.append(row)
        row.append(example)
        by_room.setdefault((seq_len if room is None else room) - len(example), []).append(row)
    return [_join(row) for row in rows]


def _join(row: Sequence[Example]) -> Example:
    if len(row) == 1:
        return row[0]
    return Example(
        torch.cat([example.input_ids for example in row]),
        torch.cat([example.labels for example in row]),
        torch.cat([torch.arange(len(example)) for example in row]),
    )


def keeps_apart(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether the model's logits for two examples are the same in one row as alone.

    Tried on the model itself, as some architectures take positions from elsewhere.

    Args:
        model: as it will be trained; left as it is.
        examples: any; the first tokens of two of them are used.
    """
    pair = [Example(e.input_ids[:8], e.labels[:8]) for e in (examples[0], examples[-1])]
    device = next(model.parameters()).device

    def logits(example: Example) -> Tensor:
        batch = collate([example], 0)
        del batch["labels"]
        with torch.no_grad():
            found = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
        return found.logits[0].float()

    with untouched(model):
        try:
            together = logits(_join(pair))
        except (TypeError, RuntimeError, ValueError):  # no position_ids, or none of this form
            return False
        apart = torch.cat([logits(example) for example in pair])
    return bool((together - apart).abs().max() <= _TOLERANCE * apart.abs().max())
