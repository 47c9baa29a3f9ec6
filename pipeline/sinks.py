"""Where events go: the run's events.jsonl, and a terminal (live bars) or a plain stream (lines)."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from pipeline import figures
from pipeline.event_log import EventLog
from pipeline.terminal.bars import LiveBars, newest_metrics
from stages.events import Emit, Event, Metric, Note, Progress

PLAIN_EVERY_S = 5.0


@dataclasses.dataclass(slots=True)
class _Pace:
    """Rate of one stage's progress since this process saw it begin, so that resumed work does not flatter it."""

    began: float
    done_before: float
    said: float = -PLAIN_EVERY_S

    def rate(self, event: Progress, now: float) -> float:
        return (event.done - self.done_before) / max(now - self.began, 1e-9)


class PlainLines:
    """A line every few seconds: percent, count, rate, time left, bytes, newest metrics."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._paces: dict[str, _Pace] = {}
        self._metrics: dict[str, Metric] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._say(f"{event.stage}: {'warning: ' if event.level == 'warning' else ''}{event.text}")
        elif isinstance(event, Metric):
            self._metrics[event.stage] = event
        elif isinstance(event, Progress):
            self._progress(event)

    def _progress(self, event: Progress) -> None:
        now = time.monotonic()
        pace = self._paces.setdefault(event.stage, _Pace(now, event.done))
        finished = event.done >= event.total
        if now - pace.said < PLAIN_EVERY_S and not finished:
            return
        pace.said = now
        parts = [
            f"{event.stage}: {event.done / max(event.total, 1):4.0%}",
            figures.share(event.done, event.total, event.unit),
        ]
        rate = pace.rate(event, now)
        if rate > 0:
            parts.append(figures.pace(rate, event.unit))
            parts.append("done" if finished else f"ETA {figures.clock((event.total - event.done) / rate)}")
        if event.bytes:
            parts.append(figures.size(event.bytes))
        if event.stage in self._metrics:
            parts.append(newest_metrics(self._metrics[event.stage]))
        self._say("  ".join(parts))

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class Sink(Protocol):
    """Who listens to a stage."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


@contextmanager
def listening(
    events: Path | None = None, stream: TextIO | None = None, *, others: Sequence[Sink] = ()
) -> Iterator[Emit]:
    """An `emit` for the time of one stage: to events.jsonl if given, to others, and as live bars or plain lines."""
    stream = stream or sys.stdout
    with ExitStack() as stack:
        sinks: list[Sink] = [LiveBars(stream) if stream.isatty() else PlainLines(stream), *others]
        if events is not None:
            sinks.append(EventLog(events))
        for sink in sinks:
            stack.callback(sink.close)

        def emit(event: Event) -> None:
            for sink in sinks:
                sink(event)

        yield emit
