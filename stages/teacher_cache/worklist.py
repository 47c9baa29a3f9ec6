"""What is left to capture, handed out part by part to replicas that may die at any time.

- A unit is handed out whole. What a dead replica held is handed out again, and nothing else is.
- A unit that has taken `DEATHS` replicas with it is halved, its halves again at each death, down to single records; a
  record that alone has taken `DEATHS` replicas with it is rejected, and its unit is complete without it.
- Safe to use from several threads. `take` waits while a part that is out may still come back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from shards.record import Record
from stages.errors import StageError
from stages.teacher_cache.plan import Unit

DEATHS = 3
"""Replicas that a unit, or a record alone, may take with it before it is suspected, or given up."""
_HOPELESS = 24
"""Deaths in a row with nothing captured in between: more than the search for a record in a unit of 65,536 takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record that no replica survived."""

    index: int
    """Its place in its split."""
    reason: str
    """What was known of the last death."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Samples of one unit, by their places in its split; one call of an engine."""

    unit: Unit
    indices: tuple[int, ...]
    deaths: int = 0
    """Replicas that died over exactly this part."""
    whole: bool = True
    """Whether it is all that its unit has left, and not a half of it."""

    @property
    def patience(self) -> int:
        """Deaths that this part may cause."""
        return DEATHS if self.whole or len(self.indices) == 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """A unit of which nothing is left to capture."""

    unit: Unit
    records: tuple[Record, ...]
    """In the order of the plan."""
    rejects: tuple[Reject, ...]


@dataclass(slots=True)
class _Standing:
    """How far a unit has come."""

    parts: int = 1
    """Parts waiting or out."""
    records: dict[int, Record] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


class WorkList:
    """The units of a run that are not published, each with the places of the samples that it still wants."""

    def __init__(self, wanted: Iterable[tuple[Unit, Sequence[int]]]) -> None:
        self._waiting = deque(Part(unit=unit, indices=tuple(indices)) for unit, indices in wanted)
        self._standing = {part.unit.name: _Standing() for part in self._waiting}
        self._changed = threading.Condition()
        self._out = 0
        self._deaths_in_a_row = 0
        self._abandoned = False

    def is_open(self) -> bool:
        """Whether a part is waiting, or may come back."""
        with self._changed:
            return not self._abandoned and bool(self._waiting or self._out)

    def take(self) -> Part | None:
        """The next part; None once nothing is left or the list was abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or self._waiting or not self._out)
            if self._abandoned or not self._waiting:
                return None
            self._out += 1
            return self._waiting.popleft()

    def finish(self, part: Part, records: Sequence[Record]) -> Complete | None:
        """A part was captured, one record a sample. Returns its unit where that is complete now."""
        with self._changed:
            self._deaths_in_a_row = 0
            self._standing[part.unit.name].records |= zip(part.indices, records, strict=True)
            return self._settle(part)

    def died(self, part: Part, reason: str) -> Complete | None:
        """The replica that held a part is gone. Returns its unit where all else of it is captured.

        Raises StageError where replicas die whatever they are given.
        """
        with self._changed:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= _HOPELESS:
                raise StageError(
                    f"{_HOPELESS} replicas died one after the other, the last of this: {reason}",
                    hint="see that the teacher fits the memory; what was published is kept",
                )
            again = self._again(replace(part, deaths=part.deaths + 1))
            if not again:
                self._standing[part.unit.name].rejects.append(Reject(index=part.indices[0], reason=reason))
            self._standing[part.unit.name].parts += len(again)
            self._waiting.extendleft(reversed(again))
            return self._settle(part)

    def abandon(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    @staticmethod
    def _again(part: Part) -> list[Part]:
        """What is handed out after a death; nothing for a record that is given up."""
        if part.deaths < part.patience:
            return [part]
        middle = len(part.indices) // 2
        halves = (part.indices[:middle], part.indices[middle:]) if middle else ()
        return [Part(unit=part.unit, indices=half, whole=False) for half in halves]

    def _settle(self, part: Part) -> Complete | None:
        self._out -= 1
        self._changed.notify_all()
        standing = self._standing[part.unit.name]
        standing.parts -= 1
        if standing.parts:
            return None
        del self._standing[part.unit.name]
        return Complete(
            unit=part.unit,
            records=tuple(record for _, record in sorted(standing.records.items(), key=lambda item: item[0])),
            rejects=tuple(sorted(standing.rejects, key=lambda reject: reject.index)),
        )
