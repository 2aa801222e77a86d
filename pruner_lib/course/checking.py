"""What every check of an exercise uses: compare an answer, and say what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_SHOWN = 8


def require(holds: Any, message: str) -> None:
    """Raise ``AssertionError`` with this message unless something holds. Runs under ``python -O`` too."""
    if not holds:
        raise AssertionError(message)


def require_equal(
    found: Any,
    expected: Any,
    *,
    asked: str,
    mistakes: Mapping[str, Any] | None = None,
    hint: str = "",
    tolerance: float = 1e-5,
) -> None:
    """Raise ``AssertionError`` unless an answer is the expected one, numbers to a relative tolerance.

    >>> require_equal(5, 6, asked="sum([1, 2, 3])", mistakes={"The last one is left out.": 3})
    Traceback (most recent call last):
    AssertionError: sum([1, 2, 3]): expected 6, got 5.

    Args:
        found: what the student's function returned.
        expected: what it should have returned.
        asked: the call, as a student would write it.
        mistakes: what to say for answers that are wrong in a known way: words → that answer.
        hint: what to say for every other wrong answer.
        tolerance: relative to the largest number expected.
    """
    if alike(found, expected, tolerance):
        return
    if found is None:
        raise AssertionError(f"{asked}: got None. Does every path of the function end in `return`?")
    known = (words for words, value in (mistakes or {}).items() if alike(found, value, tolerance))
    said = next(known, hint)
    raise AssertionError(f"{asked}: expected {shown(expected)}, got {shown(found)}. {said}".strip())


def passed(number: str, words: str) -> None:
    """The one line that a right answer prints."""
    print(f"Exercise {number} is right: {words}")


def alike(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Whether two answers say the same: tensors, lists and ranges of numbers alike, sets as sets."""
    if isinstance(expected, Mapping):
        same_keys = isinstance(found, Mapping) and set(found) == set(expected)
        return same_keys and all(alike(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, set | frozenset):
        return not isinstance(found, str | Mapping) and isinstance(found, Iterable) and set(found) == expected
    if isinstance(expected, str) or expected is None:
        return type(found) is type(expected) and found == expected
    if isinstance(expected, bool):
        return isinstance(found, bool) and found == expected
    return _same_numbers(found, expected, tolerance)


def _same_numbers(found: Any, expected: Any, tolerance: float) -> bool:
    try:
        first, second = (
            torch.as_tensor(_plain(value)).detach().double().cpu() for value in (found, expected)
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    if first.shape != second.shape:
        return False
    largest = float(second.abs().max()) if second.numel() else 0.0
    return bool(torch.allclose(first, second, rtol=tolerance, atol=tolerance * min(1.0, largest)))


def _plain(value: Any) -> Any:
    """Ranges, tuples and lists of tensors as lists that torch takes."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist() if value.ndim == 0 else value
    return value


def shown(value: Any) -> str:
    """An answer in few characters: at most eight numbers, four digits each."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    if isinstance(value, range):
        value = list(value)
    if isinstance(value, list | tuple):
        listed = [shown(item) for item in value[:_MOST_SHOWN]]
        return f"[{', '.join(listed)}{', …' if len(value) > _MOST_SHOWN else ''}]"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return repr(value)
