"""Sets of ids, one a position, in the order of the position's class.

- The class is chosen whose order puts the ids of the set first.
- Whether a set holds the first 28 ids of the order is stored as four bitmaps of seven: most of them are likely either
  way, and together they say more than one by one.
- The others are gaps between their ranks, coded in groups by their place in the set: the last gaps are the widest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.errors import Corrupt
from shards.planes.numbers import Numbers
from shards.planes.streams import StreamReader, Streams
from shards.planes.tables import MOST_COST, Tables

MAPS, MAP_BITS = 4, 7
MAPPED = MAPS * MAP_BITS
GROUPS = (0, 16, 32, 48)
"""The first place of each group of gaps."""


def choose_classes(ids_NK: NDArray[np.int32], tables: Tables) -> Numbers:
    """The class of each position: the least sum of log(1 + rank) over its first 64. Absent ids are -1.

    Sums of 64 costs fit 16 bits, so that four classes are added up at once.
    """
    costs_VW = tables.costs_VW
    costs_NW = np.zeros((len(ids_NK), costs_VW.shape[1]), np.uint64)
    _add_costs(ids_NK[:, : (1 << 16) // (MOST_COST + 1) - 1], costs_VW, costs_NW)
    classes_N: Numbers = costs_NW.view(np.uint16).argmin(axis=1).astype(np.int32)
    return classes_N


@compiled
def _add_costs(ids_NK: NDArray[np.int32], costs_VW: NDArray[np.uint64], costs_NW: NDArray[np.uint64]) -> None:
    for row in range(ids_NK.shape[0]):
        for place in range(ids_NK.shape[1]):
            if ids_NK[row, place] < 0:
                break
            for word in range(costs_NW.shape[1]):
                costs_NW[row, word] += costs_VW[ids_NK[row, place], word]


def set_streams(prefix: str, ranks_NK: NDArray[np.integer], sizes_N: Numbers) -> Streams:
    """Streams of sets given as rising ranks; what lies beyond a set's size means nothing."""
    rising_NK: Numbers = ranks_NK.astype(np.int32)
    sizes_N = sizes_N.astype(np.int32, copy=False)
    maps_AN, counts_G = np.zeros((MAPS, len(rising_NK)), np.int32), np.zeros(len(GROUPS), np.int64)
    _map_ranks(rising_NK, sizes_N, maps_AN)
    _count_gaps(maps_AN, sizes_N, MAPPED, counts_G)
    gaps = np.empty(int(counts_G.sum()), np.int32)
    _take_gaps(rising_NK, sizes_N, np.cumsum(counts_G) - counts_G, gaps)
    yield from ((f"{prefix}-map{map_}", map_N) for map_, map_N in enumerate(maps_AN))
    yield from ((f"{prefix}-gaps{group}", part) for group, part in enumerate(np.split(gaps, np.cumsum(counts_G)[:-1])))


@compiled
def _map_ranks(ranks_NK: Numbers, sizes_N: Numbers, maps_AN: Numbers) -> None:
    for row in range(len(sizes_N)):
        for place in range(sizes_N[row]):
            rank = ranks_NK[row, place]
            if rank >= 28:
                break
            maps_AN[rank // 7, row] |= 1 << rank % 7


@compiled
def _take_gaps(ranks_NK: Numbers, sizes_N: Numbers, starts_G: NDArray[np.int64], gaps: Numbers) -> None:
    """Fill as many gaps as `_count_gaps` counted."""
    at_G = starts_G.copy()
    for row in range(len(sizes_N)):
        before = 27
        for place in range(sizes_N[row]):
            rank = ranks_NK[row, place]
            if rank >= 28:
                group = min(place >> 4, 3)
                gaps[at_G[group]] = rank - before - 1
                at_G[group] += 1
                before = rank


def read_sets(reader: StreamReader, prefix: str, sizes_N: Numbers, width: int, bound: int) -> Numbers:
    """Ranks [N, width], rising; what lies beyond a set's size is some rank below `bound`. Raises Corrupt."""
    maps_AN = reader.take_all([f"{prefix}-map{map_}" for map_ in range(MAPS)], [len(sizes_N)] * MAPS)
    maps_AN = maps_AN.reshape(MAPS, -1)
    if maps_AN.max(initial=0) >= 1 << MAP_BITS:
        raise Corrupt(f"a payload's map has {maps_AN.max()}, more than {MAP_BITS} bits")
    counts_G = np.zeros(len(GROUPS), np.int64)
    if not _count_gaps(maps_AN, sizes_N, bound, counts_G):
        raise Corrupt("a payload maps ids that do not exist, or more than belong there")
    gaps = reader.take_all([f"{prefix}-gaps{group}" for group in range(len(GROUPS))], counts_G.tolist())
    ranks_NK = np.empty((len(sizes_N), width), np.int32)
    if not _fill_ranks(maps_AN, sizes_N, gaps, np.cumsum(counts_G) - counts_G, bound, ranks_NK):
        raise Corrupt(f"a payload names a rank outside {bound}")
    return ranks_NK


@compiled
def _count_gaps(maps_AN: Numbers, sizes_N: Numbers, bound: int, counts_G: NDArray[np.int64]) -> bool:
    """Count the gaps of each group; False where a map has a rank beyond `bound`, or more ranks than its set."""
    for row in range(len(sizes_N)):
        mapped = 0
        for rank in range(28):
            if maps_AN[rank // 7, row] >> rank % 7 & 1:
                if rank >= bound:
                    return False
                mapped += 1
        if mapped > sizes_N[row]:
            return False
        for place in range(mapped, sizes_N[row]):
            counts_G[min(place >> 4, 3)] += 1
    return True


@compiled
def _fill_ranks(
    maps_AN: Numbers, sizes_N: Numbers, gaps: Numbers, starts_G: NDArray[np.int64], bound: int, ranks_NK: Numbers
) -> bool:
    """Fill the ranks from as many gaps as `_count_gaps` counted; False where one is not below `bound`."""
    at_G = starts_G.copy()
    for row in range(len(sizes_N)):
        mapped = 0
        for rank in range(28):
            if maps_AN[rank // 7, row] >> rank % 7 & 1:
                ranks_NK[row, mapped] = rank
                mapped += 1
        rank = 27
        for place in range(mapped, sizes_N[row]):
            group = min(place >> 4, 3)
            rank += gaps[at_G[group]] + 1
            at_G[group] += 1
            if rank >= bound:
                return False
            ranks_NK[row, place] = rank
        for place in range(sizes_N[row], ranks_NK.shape[1]):
            ranks_NK[row, place] = bound - 1
    return True


assert (MAPPED, MAP_BITS, GROUPS) == (28, 7, (0, 16, 32, 48)), "as the loops have them"
