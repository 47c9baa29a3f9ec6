"""The exception root of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """A run cannot go on; `hint` says what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(PipelineError):
    """What the user asked for cannot be done by anyone: a wrong key, value or count."""


@contextmanager
def as_usage(hint: str) -> Iterator[None]:
    """Where a room below says by ValueError that it was asked for what cannot be."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error), hint=hint) from error
