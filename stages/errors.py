"""The exception root of the stages."""

from __future__ import annotations


class StageError(Exception):
    """A stage cannot go on; `hint` says what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SettingError(ValueError):
    """What was set cannot work here; `hint` says what to set instead."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint
