"""The exact head of a record: the most probable ids of N positions, as ranks in an order and as levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

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
        levels_NK = np.empty((len(sizes_N), width), np.int32)
        ragged = bool((sizes_N < width).any())
        there_NK = np.arange(width) < sizes_N[:, None]
        for kind, rows, places in _level_groups(least_N, width):
            if ragged:
                there = there_NK[rows, places]
                levels = np.zeros(there.shape, np.int32)
                levels[there] = reader.take(kind, int(np.count_nonzero(there)))
                levels_NK[rows, places] = levels
            else:
                span = places.stop - places.start
                levels_NK[rows, places] = reader.take(kind, len(rows) * span).reshape(len(rows), span)
        levels_NK += least_N[:, None]
        if levels_NK.max() >= tables.levels.count:
            raise Corrupt(f"a payload names level {levels_NK.max()} of {tables.levels.count}")
        if ragged:
            levels_NK[~there_NK] = ABSENT
        return cls(
            classes_N=classes_N,
            sizes_N=sizes_N,
            ranks_NK=ranks_NK,
            levels_NK=levels_NK.astype(np.uint8),
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
