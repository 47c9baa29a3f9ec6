"""The form of a run's events.jsonl, in which it is written and read: a JSON object a line.

    {"time": seconds since 1970, "kind": "progress" | "metric" | "note" | "answered", fields of the event}

A reader outlives whatever happens to the file: a last line that is half written waits for its end, a line that is none
(its writer was killed within it) is passed over, a file that was cut or replaced is read from its beginning. Kinds and
fields that this version does not know are passed over too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.events import Answered, Event, Metric, Note, Progress

_KINDS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in (Progress, Metric, Note, Answered)}
_FIELDS = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in _KINDS.items()}
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """An event and when it was written, in seconds since 1970."""

    time: float
    event: Event


class EventLog:
    """Appends every event to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # ends what a killed writer has begun

    def __call__(self, event: Event) -> None:
        line = {"time": round(time.time(), 3), "kind": type(event).__name__.lower(), **dataclasses.asdict(event)}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class EventReader:
    """Follows a file: each call of `read` returns what is new since the last."""

    def __init__(self, path: Path, *, newest_bytes: int | None = None) -> None:
        """With `newest_bytes`, start that far before the end."""
        self._path = path
        self._start = newest_bytes
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._begun = b""
        self.restarts = 0
        """How often the file was cut or replaced: what was read before that is no longer in it."""

    def read(self) -> list[Logged]:
        """All whole lines since the last call; none while there is no file."""
        found: list[Logged] = []
        try:
            with self._path.open("rb") as file:
                self._follow(os.fstat(file.fileno()))
                file.seek(self._offset)
                while block := file.read(_BLOCK):
                    self._offset += len(block)
                    *whole, self._begun = (self._begun + block).split(b"\n")
                    found += [logged for line in whole if (logged := _parsed(line))]
        except FileNotFoundError:
            pass
        return found

    def _follow(self, status: os.stat_result) -> None:
        identity = (status.st_dev, status.st_ino)
        if self._file is None and self._start is not None:
            self._offset = max(0, status.st_size - self._start)
        elif self._file not in (None, identity) or status.st_size < self._offset:
            self._offset, self._begun = 0, b""
            self.restarts += 1
        self._file = identity


def _parsed(line: bytes) -> Logged | None:
    try:
        raw: dict[str, Any] = json.loads(line)
        kind, when = raw["kind"], float(raw["time"])
        event = _KINDS[kind](**{name: value for name, value in raw.items() if name in _FIELDS[kind]})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Logged(time=when, event=event) if _is_sound(event) else None


def _is_sound(event: Event) -> bool:
    """Whether a line that parses also holds what its fields promise."""
    if isinstance(event, Progress):
        return all(isinstance(number, int | float) for number in (event.done, event.total, event.bytes))
    if isinstance(event, Metric):
        numbers = event.values.values() if isinstance(event.values, dict) else ("none",)
        return isinstance(event.step, int) and all(isinstance(number, int | float) for number in numbers)
    if isinstance(event, Answered):
        texts = (event.prompt, event.answer, event.label)
        return isinstance(event.step, int) and all(isinstance(text, str) for text in texts)
    return isinstance(event.text, str)
