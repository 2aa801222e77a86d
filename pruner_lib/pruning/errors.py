"""The error that every refused cut raises."""

from __future__ import annotations


class PruningError(ValueError):
    """A cut that cannot be made as asked; the message says why and what to do."""
