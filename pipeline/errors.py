"""The exception root of the pipeline."""

from __future__ import annotations


class PipelineError(Exception):
    """A run cannot go on; `hint` says what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(PipelineError):
    """What the user asked for cannot be done by anyone: a wrong key, value or count."""
