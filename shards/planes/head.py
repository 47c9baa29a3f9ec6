"""The exact head of a record: the most probable ids of N positions, as ranks in an order and as levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.errors import Corrupt
from shards.planes.id_sets import read_sets, set_streams
from shards.planes.levels import ABSENT, Levels
from shards.planes.numbers import Numbers
from shards.planes.streams import StreamReader, Streams
from shards.planes.tables import Tables

Float64 = NDArray[np.float64]

LEAST_BORDERS, PLACE_BORDER = (0, 18, 23, 256), 16
"""Levels are coded in six groups: by the least level of the position, and by the place of the id in its set."""
_ABSENT_KEY, _ID_BITS = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is stored of N heads of at most K ids. Beyond a position's size stand absent levels."""

    classes_N: Numbers
    sizes_N: Numbers
    ranks_NK: NDArray[np.integer]
    """Rising, in the order of the position's class."""
    levels_NK: NDArray[np.uint8]
    levels: Levels

    @classmethod
    def of(
        cls, ids_NK: NDArray[np.int32], logprobs_NK: NDArray[np.float32], classes_N: Numbers, tables: Tables
    ) -> Head:
        """Absent ids are -1 and stand last."""
        there_NK = ids_NK >= 0
        ranks_NK = tables.ranks_CV.ravel()[classes_N[:, None] * tables.vocab_size + ids_NK]
        keys_NK = ranks_NK << 8 | tables.levels.nearest(logprobs_NK.astype(np.float64))
        keys_NK[~there_NK] = _ABSENT_KEY
        keys_NK.sort(axis=1)
        return cls(
            classes_N=classes_N,
            sizes_N=there_NK.sum(axis=1).astype(np.int32),
            ranks_NK=keys_NK >> 8,
            levels_NK=keys_NK.astype(np.uint8),
            levels=tables.levels,
        )

    def streams(self) -> Streams:
        """Least levels, ids, and levels above the least; classes and sizes are the caller's."""
        least_N = self.levels_NK.min(axis=1)
        yield "least", least_N
        yield from set_streams("ids", self.ranks_NK, self.sizes_N)
        there_NK = np.arange(self.levels_NK.shape[1]) < self.sizes_N[:, None]
        above_NK = self.levels_NK - least_N[:, None]
        for kind, rows, places in _level_groups(least_N, self.levels_NK.shape[1]):
            yield kind, above_NK[rows, places][there_NK[rows, places]]

    @classmethod
    def read(cls, reader: StreamReader, classes_N: Numbers, sizes_N: Numbers, tables: Tables) -> Head:
        """Raises Corrupt."""
        least_N, width = reader.take("least", len(sizes_N)), int(sizes_N.max())
        ranks_NK = read_sets(reader, "ids", sizes_N, width, tables.vocab_size)
        groups_N = np.digitize(least_N, LEAST_BORDERS[1:-1])
        first_N = np.minimum(sizes_N, PLACE_BORDER)
        counts = [np.bincount(groups_N, part_N, len(LEAST_BORDERS) - 1) for part_N in (first_N, sizes_N - first_N)]
        counts_G = np.stack(counts, axis=1).ravel().astype(np.int64)
        above = reader.take_all([f"levels{group}" for group in range(len(counts_G))], counts_G.tolist())
        levels_NK = np.empty((len(sizes_N), width), np.uint8)
        highest = _fill_levels(least_N, sizes_N, groups_N, above, np.cumsum(counts_G) - counts_G, levels_NK)
        if highest >= tables.levels.count:
            raise Corrupt(f"a payload names level {highest} of {tables.levels.count}")
        return cls(
            classes_N=classes_N,
            sizes_N=sizes_N,
            ranks_NK=ranks_NK,
            levels_NK=levels_NK,
            levels=tables.levels,
        )

    @cached_property
    def power_N(self) -> Float64:
        """The sum of r^2 over each head."""
        power_N: Float64 = self.levels.masses.take(self.levels_NK).sum(axis=1)
        return power_N

    @cached_property
    def moment_N(self) -> Float64:
        """The sum of r^2 log r^2 over each head."""
        moment_N: Float64 = self.levels.moments.take(self.levels_NK).sum(axis=1)
        return moment_N

    @cached_property
    def least_log_N(self) -> Float64:
        """log r^2 of the least level of each head."""
        least_log_N: Float64 = self.levels.logs[self.levels_NK.min(axis=1)]
        return least_log_N

    def entries(self, shift_N: Float64, tables: Tables) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and log-probabilities by falling probability, equal levels by rising id; -1 and -inf where absent.

        `shift_N` is what brings log r^2 to the log-probability.
        """
        keys_NK = self.levels.falling_keys.take(self.levels_NK)
        keys_NK |= tables.id_in_order(self.classes_N, self.ranks_NK).view(np.uint32)
        ragged = bool((self.sizes_N < keys_NK.shape[1]).any())
        if ragged:
            keys_NK[self.levels_NK == ABSENT] = _ABSENT_KEY
        keys_NK.sort(axis=1)
        ids_NK = (keys_NK & _ID_BITS).view(np.int32)
        logprobs_NK = (self.levels.falling_logs.take(keys_NK >> 24) + shift_N[:, None]).astype(np.float32)
        if ragged:
            ids_NK[keys_NK == _ABSENT_KEY] = -1
        return ids_NK, logprobs_NK


def _level_groups(least_N: NDArray[np.integer], width: int) -> Iterator[tuple[str, NDArray[np.intp], slice]]:
    """(kind, positions, places)."""
    border = min(PLACE_BORDER, width)
    for group, (first, end) in enumerate(pairwise(LEAST_BORDERS)):
        rows = np.flatnonzero((least_N >= first) & (least_N < end))
        yield f"levels{2 * group}", rows, slice(0, border)
        yield f"levels{2 * group + 1}", rows, slice(border, width)


@compiled
def _fill_levels(
    least_N: Numbers,
    sizes_N: Numbers,
    groups_N: NDArray[np.intp],
    above: Numbers,
    starts_G: NDArray[np.int64],
    levels_NK: NDArray[np.uint8],
) -> int:
    """Fill the levels, absent ones beyond each size, and return the highest, whether it fits a byte or not."""
    at_G, highest = starts_G.copy(), 0
    for row in range(len(sizes_N)):
        for place in range(sizes_N[row]):
            group = 2 * groups_N[row] + (place >= 16)
            level = least_N[row] + above[at_G[group]]
            at_G[group] += 1
            highest = max(highest, level)
            levels_NK[row, place] = level & 255
        for place in range(sizes_N[row], levels_NK.shape[1]):
            levels_NK[row, place] = 255
    return highest


assert (PLACE_BORDER, ABSENT) == (16, 255), "as the loop has them"
