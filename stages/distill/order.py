"""Which records form each step, and who computes them: pure functions of seed, step, rank and world size.

- The records of a step, the global batch, depend on the seed and the step alone.
- Ranks and micro-batches only divide that set: by length, so that a micro-batch holds records of like length and all
  ranks are at like lengths at the same time. Any world size that divides the global batch trains on the same steps.
- Every epoch is a fresh permutation; what does not fill its last global batch is left out of that epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.reader import Split

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How one rank works off its part of a global batch."""

    micro_batch: int
    """Records a rank holds at once."""
    accumulation: int
    """Micro-batches a rank adds up before a step."""


def share_of_rank(global_batch: int, micro_batch: int, world: int) -> Share:
    """The largest micro-batch up to `micro_batch` that divides a rank's part of the global batch.

    Raises ValueError listing the world sizes that divide the global batch where this one does not.
    """
    if global_batch % world:
        counts = ", ".join(str(count) for count in range(1, global_batch + 1) if global_batch % count == 0)
        raise ValueError(f"{world} ranks do not divide a global batch of {global_batch} records; these do: {counts}")
    part = global_batch // world
    size = max(size for size in range(1, min(part, micro_batch) + 1) if part % size == 0)
    return Share(micro_batch=size, accumulation=part // size)


def record_lengths(split: Split) -> Indices:
    """Prompt and response of each record, in tokens."""
    return split.prompt_lengths.astype(np.int64) + split.response_lengths.astype(np.int64)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Indices:
    order = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)
    order.setflags(write=False)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """The steps of a run over `lengths.size` records, for a world of any size."""

    lengths: Indices
    """Cost of each record in tokens: prompt and response."""
    seed: int
    global_batch: int
    epochs: int

    def __post_init__(self) -> None:
        if self.lengths.size < self.global_batch:
            raise ValueError(f"{self.lengths.size} records do not fill a global batch of {self.global_batch}")

    @property
    def steps_per_epoch(self) -> int:
        return self.lengths.size // self.global_batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def global_batch_of(self, step: int) -> Indices:
        """The records of 0-based `step`, shortest first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permutation(self.lengths.size, self.seed, epoch)
        records = order[place * self.global_batch : (place + 1) * self.global_batch]
        return records[np.argsort(self.lengths[records], kind="stable")]

    def micro_batches(self, step: int, share: Share) -> Indices:
        """All micro-batches of a step, [accumulation, world, micro_batch]: `[:, rank]` is what a rank computes."""
        return self.global_batch_of(step).reshape(share.accumulation, -1, share.micro_batch)


def sharded_pass(lengths: Indices, micro_batch: int, rank: int, world: int) -> list[Indices]:
    """One rank's part of a pass over every record once, shortest first.

    Every rank gets the same number of micro-batches, because under ZeRO-3 each is a collective operation: some may be
    empty, and are then to be run with any records and not counted.
    """
    order = np.argsort(lengths, kind="stable")
    rounds = -(-lengths.size // (micro_batch * world))
    return [
        order[start : start + micro_batch]
        for start in range(rank * micro_batch, rounds * world * micro_batch, world * micro_batch)
    ]
