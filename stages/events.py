"""What a stage tells the outside while it works. A stage takes `emit`; who listens is not its business."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`done` of `total` units of work; rates and the time left are the listener's to compute."""

    stage: str
    done: float
    total: float
    unit: str
    """What is counted, as a plural noun: "tokens", "steps", "rows"."""
    bytes: int = 0
    """Bytes written so far, where the stage writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Named numbers measured at one step."""

    stage: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence for the reader of the log. `level` is "info" or "warning"."""

    stage: str
    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What the student says to a prompt after `step` training steps."""

    stage: str
    step: int
    prompt: str
    answer: str
    """Cut where the stage sets a limit."""
    label: str
    """What the data has in its place."""


Event = Progress | Metric | Note | Answered
Emit = Callable[[Event], None]


def silent(_: Event) -> None:
    """An `emit` that nobody listens to."""
