"""Which records form each step, and who computes them: pure functions of seed, step, rank and world size.

- The records of a step, the global batch, depend on the seed and the step alone, and on no step before it; where hard
  records are mined, also on the snapshot of difficulties that was taken as the epoch began.
- Every epoch is a fresh permutation, cut into buckets of some global batches. A bucket's records are sorted by length
  into batches, and the batches shuffled: little is padded, and long and short take turns. What does not fill the last
  global batch is left out of that epoch.
- A mined record comes once in either half of its epoch, and never twice in a bucket.
- Ranks and micro-batches only divide a global batch: a micro-batch holds records of like length, and all ranks are at
  like lengths at the same time. Any world size that divides the global batch trains on the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.reader import Split
from stages.distill.mining import Snapshot, compose
from stages.distill.settings import possible_ranks
from stages.errors import SettingError

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

    Raises SettingError listing the world sizes that divide the global batch where this one does not.
    """
    if global_batch % world:
        counts = ", ".join(map(str, possible_ranks(global_batch, global_batch)))
        raise SettingError(
            f"{world} ranks do not divide a global batch of {global_batch} records; these do: {counts}",
            hint="train on one of these rank counts (GPUS=), or set distill.global_batch",
        )
    part = global_batch // world
    size = max(size for size in range(1, min(part, micro_batch) + 1) if part % size == 0)
    return Share(micro_batch=size, accumulation=part // size)


def record_lengths(split: Split) -> Indices:
    """Tokens of each record, [records, 2]: its prompt's and its response's, which are padded apart."""
    return np.stack([split.prompt_lengths, split.response_lengths], 1).astype(np.int64)


def tiled(records: Indices, lengths_N2: Indices, size: int) -> Indices:
    """`records` in an order in which every `size` in a row have like prompts and like responses, and so do neighbours.

    Sort-tile-recursive packing (Leutenegger et al. 1997): strips by response length, each sorted by prompt length,
    every other one backwards. `lengths_N2` is indexed by record.
    """
    tiles = -(-records.size // size)
    strips = round(tiles**0.5)
    by_response = records[np.argsort(lengths_N2[records, 1], kind="stable")]
    cuts = np.linspace(0, tiles, strips + 1).round().astype(int)[1:-1] * size
    pieces = []
    for number, strip in enumerate(np.split(by_response, cuts)):
        by_prompt = np.argsort(lengths_N2[strip, 0], kind="stable")
        pieces.append(strip[by_prompt[::-1] if number % 2 else by_prompt])
    return np.concatenate(pieces)


class TrainingOrder:
    """The steps of a run over `lengths_N2.shape[0]` records, for a world of any size.

    Raises SettingError where the records do not fill a global batch, or where some are to be mined and fill only one.
    """

    def __init__(
        self,
        *,
        lengths_N2: Indices,
        seed: int,
        global_batch: int,
        epochs: int,
        bucket_batches: int = 1,
        mining_share: float = 0.0,
    ) -> None:
        count = lengths_N2.shape[0]
        if count < global_batch:
            raise SettingError(
                f"{count} records do not fill a global batch of {global_batch}",
                hint=f"set distill.global_batch = {count} or lower, or cache more records",
            )
        if mining_share and count < 2 * global_batch:
            raise SettingError(
                f"distill.mining_share: an epoch needs two steps; {count} records fill one, of {global_batch}",
                hint=f"lower distill.global_batch to {count // 2} or less, or set distill.mining_share = 0",
            )
        self.lengths_N2 = lengths_N2
        """Tokens of each record: prompt, response."""
        self.steps_per_epoch: int = count // global_batch
        self.steps: int = epochs * self.steps_per_epoch
        self._seed = seed
        self._global_batch = global_batch
        # Buckets of a quarter epoch at most: else a small set would be cut into the same batches in every epoch.
        self._bucket = min(bucket_batches, max(1, self.steps_per_epoch // 4))
        self._half = self.steps_per_epoch // self._bucket // 2 * self._bucket * global_batch
        places, left_over = self.steps_per_epoch * global_batch, count % global_batch
        # At least as many as rest must be left that did not rest before.
        self._repeats = min(int(mining_share * places), self._half, (count - 2 * left_over) // 3)
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        self._visits_R = lru_cache(maxsize=2)(self._make_visits)
        self._batches = lru_cache(maxsize=2)(self._make_batches)

    def global_batch_of(self, step: int, snapshot: Snapshot | None = None) -> Indices:
        """The records of 0-based `step`. `snapshot` is that of its epoch; None where none are mined."""
        epoch, place = divmod(step, self.steps_per_epoch)
        bucket, within = divmod(place, self._bucket)
        records: Indices = self._batches(epoch, bucket, snapshot)[within]
        return records

    def micro_batches(self, step: int, share: Share, snapshot: Snapshot | None = None) -> Indices:
        """All micro-batches of a step, [accumulation, world, micro_batch]: `[:, rank]` is what a rank computes."""
        records = tiled(self.global_batch_of(step, snapshot), self.lengths_N2, share.micro_batch)
        return records.reshape(share.accumulation, -1, share.micro_batch)

    def visits_R(self, epoch: int, snapshot: Snapshot | None = None) -> Indices:
        """How often each record comes in an epoch: 0, 1 or 2 times."""
        visits_R: Indices = self._visits_R(epoch, snapshot)
        return visits_R

    def _make_visits(self, epoch: int, snapshot: Snapshot | None) -> Indices:
        used = self._epoch_order(epoch, snapshot)[: self.steps_per_epoch * self._global_batch]
        return np.bincount(used, minlength=self.lengths_N2.shape[0])

    def _make_epoch_order(self, epoch: int, snapshot: Snapshot | None) -> Indices:
        rng = _generator(self._seed, epoch, 0)
        shuffled = rng.permutation(self.lengths_N2.shape[0])
        if snapshot is None:
            return shuffled
        places = self.steps_per_epoch * self._global_batch
        twice, once = compose(snapshot, shuffled, repeats=self._repeats, places=places)
        halves = np.split(rng.permutation(once), [self._half - self._repeats])
        return np.concatenate([rng.permutation(np.concatenate([twice, half])) for half in halves])

    def _make_batches(self, epoch: int, bucket: int, snapshot: Snapshot | None) -> Indices:
        """The global batches of one bucket, [batches, global batch], in the order in which they are trained on."""
        first = bucket * self._bucket
        last = min(first + self._bucket, self.steps_per_epoch)
        size = self._global_batch
        records = tiled(self._epoch_order(epoch, snapshot)[first * size : last * size], self.lengths_N2, size)
        return _generator(self._seed, epoch, bucket + 1).permutation(records.reshape(-1, size))


def _generator(seed: int, epoch: int, part: int) -> np.random.Generator:
    """Independent randomness for every seed, epoch and part of it; what came before need not be drawn."""
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, part], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sharded_pass(lengths_N2: Indices, micro_batch: int, rank: int, world: int) -> list[Indices]:
    """One rank's part of a pass over every record once.

    Every rank gets the same number of micro-batches, because under ZeRO-3 each is a collective operation: some may be
    empty, and are then to be run with any records and not counted.
    """
    order = tiled(np.arange(lengths_N2.shape[0]), lengths_N2, micro_batch)
    rounds = -(-order.size // (micro_batch * world))
    return [
        order[start : start + micro_batch]
        for start in range(rank * micro_batch, rounds * world * micro_batch, world * micro_batch)
    ]
