"""The corpus cut into units of work. One unit is one shard and one call of the engine.

Pure: the plan depends on the sizes of the splits and of a unit, never on who works on it or how much is done already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from shards.units import unit_name
from stages.corpus.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Samples `start .. stop-1` of a split; the shard is named after it."""

    name: str
    split: str
    start: int
    stop: int

    def of(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """This unit's part of its split's samples."""
        return samples[self.start : self.stop]


def plan_units(splits: Mapping[str, Sized], records_per_shard: int) -> list[Unit]:
    """The units of each split in turn: train-00000, train-00001, ..., each full but the last of its split."""
    return [
        Unit(
            name=unit_name(split, index),
            split=split,
            start=start,
            stop=min(start + records_per_shard, len(samples)),
        )
        for split, samples in splits.items()
        for index, start in enumerate(range(0, len(samples), records_per_shard))
    ]
