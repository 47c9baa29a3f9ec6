"""Live bars for a stage at work in this terminal."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from pipeline import figures
from stages.events import Event, Metric, Note, Progress

_SHOWN_METRICS = ("loss", "kl", "ce", "attention", "top1", "tokens_per_s", "data_wait", "memory_gib")


def newest_metrics(event: Metric) -> str:
    """The few numbers that stand beside a bar."""
    return "  ".join(f"{name} {figures.number(event.values[name])}" for name in _SHOWN_METRICS if name in event.values)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(figures.pace(speed, task.fields["unit"]) if speed else "", style="cyan")


class LiveBars:
    """A bar a stage, with rate, time left, bytes and the newest metrics."""

    def __init__(self, stream: TextIO) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[share]}"),
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
        elif isinstance(event, Progress):
            self._progress(event)

    def _progress(self, event: Progress) -> None:
        extra = [figures.size(event.bytes)] if event.bytes else []
        extra += [newest_metrics(self._metrics[event.stage])] if event.stage in self._metrics else []
        share = figures.share(event.done, event.total, event.unit)
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(
                event.stage, total=event.total, unit=event.unit, share=share, extra=""
            )
        self._bars.update(
            self._tasks[event.stage],
            completed=event.done,
            total=event.total,
            unit=event.unit,
            share=share,
            extra="  ".join(extra),
        )

    def close(self) -> None:
        self._bars.stop()
