"""How large a planned set will be, from the records of a small one that was made the same way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import InvalidRequest
from shards.reader import ShardSet
from shards.storage import Location

_NORMAL_95, _STUDENT = 1.96, 2.7
"""Student's 97.5 % quantile at n degrees of freedom is 1.96 + 2.7 / n within 3 % from n = 5 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeEstimate:
    """Bytes of the shards of a planned set."""

    sampled: int
    """Records that it is told from."""
    positions: int
    """Of the planned set."""
    bytes: float
    margin: float
    """Half the width of the 95 % interval, for records that are drawn from the same source."""

    @property
    def bytes_per_position(self) -> float:
        return self.bytes / self.positions


def estimate_size(location: Location, positions: int) -> SizeEstimate:
    """Extrapolate from every record of a set, in any state but damaged, to `positions`.

    What belongs to no row (schema, checks, framing) is shared by the rows of its shard. Raises InvalidRequest for
    fewer than two records or no positions, and what opening a shard raises.
    """
    shards = ShardSet(location)
    sizes, lengths = [], []
    for info in shards.manifest.shards:
        shard = shards.open(info)
        rows = np.array([shard.row_bytes(row) for row in range(len(shard))], np.float64)
        sizes.append(rows + (shard.size - rows.sum()) / len(shard))
        lengths.append(shard.numbers("positions").astype(np.float64))
    return extrapolate(np.concatenate(sizes), np.concatenate(lengths), positions)


def extrapolate(bytes_R: NDArray[np.float64], positions_R: NDArray[np.float64], planned: int) -> SizeEstimate:
    """The ratio estimator of survey sampling with its jackknife error (Cochran, Sampling Techniques, ch. 6).

    Bytes follow positions, so their ratio over R sampled records varies far less than the size of a record does.
    """
    count = len(bytes_R)
    if count < 2 or planned < 1:
        raise InvalidRequest(
            f"an estimate takes two records and a planned position, not {count} and {planned}",
            hint="cache a few dozen samples of the corpus first",
        )
    ratio = bytes_R.sum() / positions_R.sum()
    without_R = (bytes_R.sum() - bytes_R) / (positions_R.sum() - positions_R)
    error = math.sqrt((count - 1) / count * ((without_R - without_R.mean()) ** 2).sum())
    quantile = _NORMAL_95 + _STUDENT / (count - 1)
    return SizeEstimate(sampled=count, positions=planned, bytes=ratio * planned, margin=quantile * error * planned)
