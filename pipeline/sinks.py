"""Where events go: the run's events.jsonl, and a terminal (live bars) or a plain stream (lines)."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from stages.events import Emit, Event, Metric, Note, Progress

PLAIN_EVERY_S = 5.0
_SHOWN_METRICS = ("loss", "kl", "ce", "top1", "tokens_per_s")


class EventLog:
    """Appends every event to events.jsonl, a line each: {"time": seconds since 1970, "kind": …, fields}."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        line = {"time": round(time.time(), 3), "kind": type(event).__name__.lower(), **dataclasses.asdict(event)}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


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
        else:
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
            f"{event.done:,.0f}/{event.total:,.0f} {event.unit}",
        ]
        rate = pace.rate(event, now)
        if rate > 0:
            parts.append(f"{_rate(rate)} {event.unit}/s")
            parts.append("done" if finished else f"ETA {_clock((event.total - event.done) / rate)}")
        if event.bytes:
            parts.append(_bytes(event.bytes))
        if event.stage in self._metrics:
            parts.append(_metrics(self._metrics[event.stage]))
        self._say("  ".join(parts))

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


class LiveBars:
    """A bar a stage, with rate, time left, bytes and the newest metrics."""

    def __init__(self, stream: TextIO) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[extra]}", style="dim"),
            console=Console(file=stream),
            speed_estimate_period=60,
        )
        self._tasks: dict[str, TaskID] = {}
        self._metrics: dict[str, Metric] = {}
        self._bars.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            style = "yellow" if event.level == "warning" else "dim"
            self._bars.console.print(Text(f"{event.stage}: {event.text}", style=style))
        elif isinstance(event, Metric):
            self._metrics[event.stage] = event
        else:
            self._progress(event)

    def _progress(self, event: Progress) -> None:
        extra = [_bytes(event.bytes)] if event.bytes else []
        extra += [_metrics(self._metrics[event.stage])] if event.stage in self._metrics else []
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total, unit=event.unit, extra="")
        self._bars.update(
            self._tasks[event.stage], completed=event.done, total=event.total, unit=event.unit, extra="  ".join(extra)
        )

    def close(self) -> None:
        self._bars.stop()


@contextmanager
def listening(events: Path | None = None, stream: TextIO | None = None) -> Iterator[Emit]:
    """An `emit` for the time of one stage: to events.jsonl if given, and to the terminal or as plain lines."""
    stream = stream or sys.stdout
    with ExitStack() as stack:
        sinks: list[EventLog | PlainLines | LiveBars] = [LiveBars(stream) if stream.isatty() else PlainLines(stream)]
        if events is not None:
            sinks.append(EventLog(events))
        for sink in sinks:
            stack.callback(sink.close)

        def emit(event: Event) -> None:
            for sink in sinks:
                sink(event)

        yield emit


def _metrics(event: Metric) -> str:
    return "  ".join(f"{name} {_number(event.values[name])}" for name in _SHOWN_METRICS if name in event.values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
