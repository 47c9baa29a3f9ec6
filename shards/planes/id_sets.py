"""Sets of ids, one a position, in the order of the position's class.

- The class is chosen whose order puts the ids of the set first.
- A set is the gaps between its rising ranks. How wide the next gap will be is known roughly: ids grow rare with their
  rank, and those that are left must find room. That chooses its code.
- The gaps of all sets lie place by place, so that one does not wait for the one before it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.errors import Corrupt
from shards.planes.numbers import Numbers
from shards.planes.rans import Bytes, Contexts, Index, Reader, Source, Stream, decode
from shards.planes.tables import GAP_CONTEXTS, MAX_CLASSES, MOST_COST, Tables

ABSENT_RANK = 1 << 24
"""Ranks of ids that are not in a set; they stand last."""
RANK_OFFSET = 10
"""Ranks up to about this one are all equally likely to be kept."""
NEXT_STEPS = np.rint(8 * np.log2(RANK_OFFSET + np.arange(1 << 16))).astype(np.uint8)
LEFT_STEPS = np.rint(8 * np.log2(np.maximum(np.arange(1 << 12), 1))).astype(np.uint8)


def choose_classes(ids_NK: NDArray[np.int32], tables: Tables) -> Numbers:
    """The class of each position: the least sum of log(1 + rank) over its first 64. Absent ids are -1.

    Sums of 64 costs fit 16 bits, so that four classes are added up at once.
    """
    classes_N = np.empty(len(ids_NK), np.int32)
    _choose(ids_NK, tables.costs_VW, classes_N)
    return classes_N


def set_stream(kind: str, ranks_NK: Numbers, sizes_N: Numbers) -> Stream:
    """The gaps of sets given as rising ranks; what lies beyond a set's size means nothing."""
    count = int(sizes_N.sum())
    gaps, contexts = np.empty(count, np.int32), np.empty(count, np.uint16)
    _take_gaps(ranks_NK, sizes_N, NEXT_STEPS, LEFT_STEPS, gaps, contexts)
    return Stream(kind, gaps, contexts)


def read_sets(reader: Reader, kind: str, sizes_N: Numbers, bound: int) -> Numbers:
    """[K, N]: the ranks of sets of these sizes, all below `bound`; 0 beyond a set's size. Raises Corrupt."""
    ranks_KN = np.zeros((int(sizes_N.max(initial=0)), len(sizes_N)), np.int32)
    if not fill_ranks(reader.source, reader.row(kind), NEXT_STEPS, LEFT_STEPS, sizes_N, bound, ranks_KN):
        raise Corrupt(f"a payload names a rank outside {bound}")
    return ranks_KN


def by_place(values_NK: NDArray[np.integer], sizes_N: Numbers) -> NDArray[np.integer]:
    """The first of each set, then the second of each that has two, …"""
    there_KN = np.arange(values_NK.shape[1])[:, None] < sizes_N
    return values_NK.T[there_KN]


def from_places(values: Numbers, sizes_N: Numbers, width: int) -> Numbers:
    """[width, N]: the inverse of `by_place`; 0 beyond a set's size."""
    values_KN = np.zeros((width, len(sizes_N)), np.int32)
    fill_places(values, sizes_N, values_KN)
    return values_KN


assert (int(NEXT_STEPS[-1]) + 24 >> 3) + 1 == GAP_CONTEXTS, "as its contexts come out"


@compiled
def _choose(ids_NK: Numbers, costs_VW: NDArray[np.uint64], classes_N: Numbers) -> None:
    lanes, most = np.empty(6, np.uint64), np.uint64(min(ids_NK.shape[1], 64))
    for row in range(np.uint64(len(ids_NK))):
        a = b = c = d = e = f = np.uint64(0)
        for place in range(most):
            if ids_NK[row, place] < 0:
                break
            id_ = np.uint64(ids_NK[row, place])
            a += costs_VW[id_, 0]
            b += costs_VW[id_, 1]
            c += costs_VW[id_, 2]
            d += costs_VW[id_, 3]
            e += costs_VW[id_, 4]
            f += costs_VW[id_, 5]
        lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5] = a, b, c, d, e, f
        least = np.uint64(65536)
        for number in range(24):
            cost = lanes[number >> 2] >> np.uint64(16 * (number & 3)) & np.uint64(65535)
            if cost < least:
                least, classes_N[row] = cost, number


assert (64 * (MOST_COST + 1) < 1 << 16, MAX_CLASSES) == (True, 24), "as the loop has them"


@compiled
def _context(least: Index, left: Index, next_steps: Bytes, left_steps: Bytes) -> Index:
    """In octaves, how wide a gap is likely that begins at rank `least` where `left` ids are still to come."""
    near, few = np.uint64(min(least, 65535)), np.uint64(min(left, 4095))
    wide = np.int64(next_steps[near]) - np.int64(left_steps[few]) + 24
    return (wide if wide > 0 else np.int64(0)) >> 3


@compiled
def _take_gaps(
    ranks_NK: Numbers, sizes_N: Numbers, next_steps: Bytes, left_steps: Bytes, gaps: Numbers, contexts: Contexts
) -> None:
    least_N, index = np.zeros(len(sizes_N), np.int64), np.uint64(0)
    for place in range(np.uint64(ranks_NK.shape[1])):
        for row in range(np.uint64(len(sizes_N))):
            left = np.int64(sizes_N[row]) - np.int64(place)
            if left > 0:
                rank = np.int64(ranks_NK[row, place])
                contexts[index] = _context(least_N[row], left, next_steps, left_steps)
                gaps[index] = rank - least_N[row]
                index += np.uint64(1)
                least_N[row] = rank + 1


@compiled
def fill_ranks(
    source: Source,
    first: Index,
    next_steps: Bytes,
    left_steps: Bytes,
    sizes_N: Numbers,
    bound: int,
    ranks_KN: Numbers,
) -> bool:
    """Fill `ranks_KN` and move states and places on; False where one is not below `bound`."""
    going, least_N = np.empty(len(sizes_N), np.uint64), np.zeros(len(sizes_N), np.int64)
    codes, gaps = np.empty(len(sizes_N), np.uint16), np.empty(len(sizes_N), np.int32)
    fits = True
    for place in range(np.uint64(len(ranks_KN))):
        count = np.uint64(0)
        for row in range(np.uint64(len(sizes_N))):
            left = np.int64(sizes_N[row]) - np.int64(place)
            if left > 0:
                codes[count] = first + _context(least_N[row], left, next_steps, left_steps)
                going[count] = row
                count += np.uint64(1)
        decode(source, codes[:count], gaps[:count])
        for at in range(count):
            row = going[at]
            rank = least_N[row] + gaps[at]
            fits &= rank < bound
            rank = min(rank, bound - 1)
            ranks_KN[place, row] = rank
            least_N[row] = rank + 1
    return fits


@compiled
def fill_places(values: Numbers, sizes_N: Numbers, values_KN: Numbers) -> None:
    index = np.uint64(0)
    for place in range(np.uint64(len(values_KN))):
        for row in range(np.uint64(len(sizes_N))):
            if np.int64(place) < sizes_N[row]:
                values_KN[place, row] = values[index]
                index += np.uint64(1)
