"""What a run's events come to: progress and pace of each stage, a curve of each metric, answers, the newest notes.

Memory is bounded however long the run: curves and answers are thinned as they grow, notes and paces are the newest
ones. A metric whose name nobody here knows is a curve like any other.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from pipeline.event_log import Logged
from stages.events import Answered, Event, Metric, Note, Progress

CURVE_POINTS = 512
ANSWERS = 16
"""To one prompt."""
RECENT = 64
NOTES = 32


Value = TypeVar("Value")


def add_thinned(points: list[tuple[int, Value]], step: int, value: Value, most: int) -> None:
    """Append to points by rising step; where there are more than `most`, an even number, every other one goes.

    The first and the newest stay. A run that resumes from a checkpoint takes back what came after it.
    """
    while points and points[-1][0] >= step:
        points.pop()
    points.append((step, value))
    if len(points) > most:
        del points[-2::-2]


@dataclass(slots=True)
class Curve:
    """A metric over steps."""

    points: list[tuple[int, float]] = field(default_factory=list)
    """(step, value), thinned; the newest is always among them."""
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(step, value), every one of the newest."""

    def add(self, step: int, value: float) -> None:
        add_thinned(self.points, step, value, CURVE_POINTS)
        while self.recent and self.recent[-1][0] >= step:
            self.recent.pop()
        self.recent.append((step, value))

    @property
    def newest(self) -> float:
        return self.points[-1][1]


@dataclass(slots=True)
class StageHistory:
    """One stage, over every start of the run."""

    began: float
    updated: float
    progress: Progress | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    paces: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(time, done) of the newest reports."""

    def rate(self, since: float = 0.0) -> float | None:
        """Units a second over the newest reports after `since`; None where there are too few."""
        paces = [pace for pace in self.paces if pace[0] >= since]
        if len(paces) < 2 or paces[-1][0] <= paces[0][0] or paces[-1][1] <= paces[0][1]:
            return None
        return (paces[-1][1] - paces[0][1]) / (paces[-1][0] - paces[0][0])

    def usual_pause(self, since: float = 0.0) -> float | None:
        """Median seconds between reports after `since`."""
        times = [when for when, _ in self.paces if when >= since]
        return statistics.median(b - a for a, b in pairwise(times)) if len(times) > 2 else None

    @property
    def is_done(self) -> bool:
        return self.progress is not None and self.progress.done >= self.progress.total


@dataclass(slots=True)
class History:
    """Everything that a run has said, in the order of its first words."""

    stages: dict[str, StageHistory] = field(default_factory=dict)
    notes: deque[tuple[float, Note]] = field(default_factory=lambda: deque(maxlen=NOTES))
    answers: dict[str, list[tuple[int, Answered]]] = field(default_factory=dict)
    """(step, answer) by prompt, thinned; the first and the newest are always among them."""
    updated: float | None = None

    def take(self, logged: Iterable[Logged]) -> None:
        for entry in logged:
            self._take(entry.time, entry.event)

    def _take(self, when: float, event: Event) -> None:
        self.updated = when
        if isinstance(event, Note):
            self.notes.append((when, event))
            return
        if isinstance(event, Answered):
            add_thinned(self.answers.setdefault(event.prompt, []), event.step, event, ANSWERS)
            return
        stage = self.stages.setdefault(event.stage, StageHistory(when, when))
        stage.updated = when
        if isinstance(event, Metric):
            for name, value in event.values.items():
                stage.curves.setdefault(name, Curve()).add(event.step, value)
            return
        if stage.progress is not None and event.done < stage.progress.done:
            stage.paces.clear()  # it began anew, or resumed
        stage.progress = event
        stage.paces.append((when, event.done))
