"""The error that every refused save or load raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read as asked; the message says why and what to do."""
