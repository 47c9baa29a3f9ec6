"""Sets of ids, one a position, in the order of the position's class.

- The class is chosen whose order puts the ids of the set first.
- Whether a set holds the first 28 ids of the order is stored as four bitmaps of seven: most of them are likely either
  way, and together they say more than one by one.
- The others are gaps between their ranks, coded in groups by their place in the set: the last gaps are the widest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

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
    costs_NW = tables.costs_VW[ids_NK[:, : (1 << 16) // (MOST_COST + 1) - 1]].sum(axis=1)
    classes_N: Numbers = costs_NW.view(np.uint16).argmin(axis=1).astype(np.int32)
    return classes_N


def set_streams(prefix: str, ranks_NK: NDArray[np.integer], sizes_N: Numbers) -> Streams:
    """Streams of sets given as rising ranks; what lies beyond a set's size must not be below MAPPED."""
    ranks_NK = ranks_NK.astype(np.int32)
    mapped_NK = ranks_NK < MAPPED
    bits = np.zeros((len(ranks_NK), MAPPED), np.int32)
    bits[np.nonzero(mapped_NK)[0], ranks_NK[mapped_NK]] = 1
    for map_, bits_N7 in enumerate(np.split(bits, MAPS, axis=1)):
        yield f"{prefix}-map{map_}", bits_N7 @ (1 << np.arange(MAP_BITS, dtype=np.int32))
    before_NK = np.full_like(ranks_NK, MAPPED - 1)
    np.maximum(ranks_NK[:, :-1], MAPPED - 1, out=before_NK[:, 1:])
    gaps_NK = ranks_NK - before_NK - 1
    gapped_NK = ~mapped_NK & (np.arange(ranks_NK.shape[1]) < sizes_N[:, None])
    for group, places in _groups(ranks_NK.shape[1]):
        yield f"{prefix}-gaps{group}", gaps_NK[:, places][gapped_NK[:, places]]


def read_sets(reader: StreamReader, prefix: str, sizes_N: Numbers, width: int, bound: int) -> Numbers:
    """Ranks [N, width], rising; what lies beyond a set's size is some rank below `bound`. Raises Corrupt."""
    mapped, mapped_N = _read_maps(reader, prefix, sizes_N, bound)
    if width == 0:
        return np.empty((len(sizes_N), 0), np.int32)
    ragged = bool((sizes_N < width).any())
    parts = []
    for group, places in _groups(width):
        place_K = np.arange(places.start, places.stop)
        gapped_NK = place_K >= mapped_N[:, None]
        if ragged:
            gapped_NK &= place_K < sizes_N[:, None]
        steps_NK = np.zeros(gapped_NK.shape, np.int32)
        steps_NK[gapped_NK] = reader.take(f"{prefix}-gaps{group}", int(np.count_nonzero(gapped_NK))) + 1
        parts.append(steps_NK)
    steps_NK = np.concatenate(parts, axis=1)
    if steps_NK.max() > bound:
        raise Corrupt(f"a payload skips {steps_NK.max()} of {bound} ranks")
    wide = width * bound >= 1 << 31
    ranks_NK = np.cumsum(steps_NK, axis=1, dtype=np.int64 if wide else np.int32) + (MAPPED - 1)
    if (ranks_NK[mapped_N < sizes_N, -1] >= bound).any():
        raise Corrupt(f"a payload names a rank outside {bound}")
    ranks_NK[np.arange(width) < mapped_N[:, None]] = mapped
    if ragged:
        np.minimum(ranks_NK, bound - 1, out=ranks_NK)
    return ranks_NK.astype(np.int32, copy=False)


def _read_maps(
    reader: StreamReader, prefix: str, sizes_N: Numbers, bound: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The mapped ranks of all sets, one after the other, and how many each set has. Raises Corrupt."""
    maps_NA = np.empty((len(sizes_N), MAPS), np.uint8)
    for map_ in range(MAPS):
        numbers_N = reader.take(f"{prefix}-map{map_}", len(sizes_N))
        if numbers_N.max() >= 1 << MAP_BITS:
            raise Corrupt(f"a payload's map has {numbers_N.max()}, more than {MAP_BITS} bits")
        maps_NA[:, map_] = numbers_N
    bits_NB = np.unpackbits(maps_NA, axis=1, bitorder="little")
    # Eight bits a map, of which the last is never set.
    found = np.flatnonzero(bits_NB) & (8 * MAPS - 1)
    mapped, mapped_N = found - (found >> 3), bits_NB.sum(axis=1, dtype=np.int32)
    if (mapped_N > sizes_N).any() or mapped.max(initial=-1) >= bound:
        raise Corrupt("a payload maps ids that do not exist, or more than belong there")
    return mapped, mapped_N


def _groups(width: int) -> Iterator[tuple[int, slice]]:
    """(group, places) for sets of at most `width` ids."""
    for group, (first, end) in enumerate(zip(GROUPS, (*GROUPS[1:], width), strict=True)):
        if first < width:
            yield group, slice(first, min(end, width))
