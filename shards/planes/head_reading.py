"""The compiled passes that read heads of N positions: the inverse of `head_writing.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.planes.head_writing import ENTROPY_SCALE, Float32, Float64, Keys, level_context, outside
from shards.planes.id_sets import fill_places, fill_ranks
from shards.planes.numbers import Numbers
from shards.planes.rans import Bytes, Index, Rows, Source, decode


@compiled
def _choose_rows(others_N: Numbers, least_N: Numbers, first: Index, rows: Rows) -> None:
    index = np.uint64(0)
    for place in range(np.uint64(others_N.max())):
        for row in range(np.uint64(len(others_N))):
            if np.int64(place) < others_N[row]:
                rows[index] = first + level_context(least_N[row], np.int64(place))
                index += np.uint64(1)


@compiled
def read_keys(
    source: Source,
    rows_8: Rows,
    next_steps: Bytes,
    left_steps: Bytes,
    labels_N: Numbers,
    orders_CV: NDArray[np.int32],
    masses: Float64,
    moments: Float64,
    logs: Float64,
    k: int,
    most: int,
    sized: bool,
    tail_known: bool,
) -> tuple[int, int, Numbers, Keys, Float64]:
    """The number of a fault or 0, how many ids are held, classes, keys; log tails, entropies and shifts.

    `rows_8` are the first rows of all kinds in their order; at most `most` ids are allocated for.
    """
    count, (classes, bound), none = len(labels_N), orders_CV.shape, (np.empty((0, 0), np.uint32), np.empty((3, 0)))
    fault, (held, width, others), (classes_N, sizes_N, others_N, least_N, kept_N) = _read_sizes(
        source, rows_8, count, classes, k, most, sized
    )
    if fault:
        return fault, held, classes_N, none[0], none[1]
    ranks_KN, above_KN = np.zeros((others, count), np.int32), np.zeros((others, count), np.int32)
    if not fill_ranks(source, rows_8[4], next_steps, left_steps, others_N, bound, ranks_KN):
        return 3, held, classes_N, none[0], none[1]
    leveled = np.int64(others_N.sum())
    rows = np.empty(leveled + (1 + tail_known) * count, np.uint16)
    _choose_rows(others_N, least_N, rows_8[5], rows)
    rows[leveled : leveled + count] = rows_8[6]
    rows[leveled + count :] = rows_8[7]
    numbers = np.empty(len(rows), np.int32)
    decode(source, rows, numbers)
    fill_places(numbers, others_N, above_KN)
    keys_NK = np.full((count, width), np.uint32(0xFFFFFFFF), np.uint32)
    powers_2N, outside_3N = np.empty((2, count)), np.empty((3, count))
    fault = _fill_keys(
        ranks_KN,
        above_KN,
        classes_N,
        others_N,
        least_N,
        kept_N,
        labels_N,
        orders_CV,
        masses,
        moments,
        keys_NK,
        powers_2N,
    )
    if fault == 0:
        tails_N, entropies_N = numbers[leveled : leveled + count], numbers[leveled + count :]
        log_vocab = np.log(bound)
        _fill_outside(tails_N, entropies_N, sizes_N, least_N, powers_2N, logs, log_vocab, outside_3N)
    return fault, held, classes_N, keys_NK, outside_3N


@compiled
def _read_sizes(
    source: Source,
    rows_8: Rows,
    count: int,
    classes: int,
    k: int,
    most: int,
    sized: bool,
) -> tuple[int, tuple[int, int, int], tuple[Numbers, Numbers, Numbers, Numbers, Numbers]]:
    """The number of a fault or 0; how many ids are held, the most at a position and the most but its label; classes,
    sizes, sizes without the label, least levels, and the numbers of labels."""
    held, width, others = 0, 0, 0
    classes_N = _take(source, rows_8[0], count)
    sizes_N = np.full(count, k - 1, np.int32)
    if sized:
        sizes_N = _take(source, rows_8[1], count)
    least_N = _take(source, rows_8[2], count)
    kept_N = _take(source, rows_8[3], count)
    others_N, known = np.empty(count, np.int32), True
    for row in range(count):
        sizes_N[row] += 1
        others_N[row] = sizes_N[row] - (kept_N[row] > 0)
        held, width, others = held + sizes_N[row], max(width, sizes_N[row]), max(others, others_N[row])
        known &= classes_N[row] < classes
    fault = 1 if not known else 2 if width > k or width * count > most else 0
    return fault, (held, width, others), (classes_N, sizes_N, others_N, least_N, kept_N)


@compiled
def _take(source: Source, row: Index, count: int) -> Numbers:
    """A stream of one code."""
    rows, numbers = np.full(count, row, np.uint16), np.empty(count, np.int32)
    decode(source, rows, numbers)
    return numbers


@compiled
def _fill_keys(
    ranks_KN: Numbers,
    above_KN: Numbers,
    classes_N: Numbers,
    others_N: Numbers,
    least_N: Numbers,
    kept_N: Numbers,
    labels_N: Numbers,
    orders_CV: NDArray[np.int32],
    masses: Float64,
    moments: Float64,
    keys_NK: Keys,
    powers_2N: Float64,
) -> int:
    """Keys that rise as probabilities fall, and the sums of r^2 and r^2 log r^2. Returns a fault, or 0.

    Position by position: its ranks rise, so that the order of its class is read from front to back.
    """
    top, no_level, has_label = np.int64(len(masses) - 1), False, False
    for row in range(np.uint64(len(others_N))):
        class_, least, label, power, moment = np.uint64(classes_N[row]), np.int64(least_N[row]), labels_N[row], 0.0, 0.0
        size = np.uint64(others_N[row])
        for place in range(size):
            id_ = orders_CV[class_, np.uint64(ranks_KN[place, row])]
            level = least + above_KN[place, row]
            no_level |= level > top
            has_label |= id_ == label
            level = np.uint64(min(level, top))
            keys_NK[row, place] = np.uint32(np.uint64(254) - level) << np.uint32(24) | np.uint32(id_)
            power += masses[level]
            moment += moments[level]
        level = least + kept_N[row] - (kept_N[row] > 0)
        no_level |= level > top
        if kept_N[row] > 0:
            level = np.uint64(min(level, top))
            keys_NK[row, size] = np.uint32(np.uint64(254) - level) << np.uint32(24) | np.uint32(label)
            power += masses[level]
            moment += moments[level]
        powers_2N[0, row], powers_2N[1, row] = power, moment
    return 4 if no_level else 5 if has_label else 0


@compiled
def _fill_outside(
    tails_N: Numbers,
    entropies_N: Numbers,
    sizes_N: Numbers,
    least_N: Numbers,
    powers_2N: Float64,
    logs: Float64,
    log_vocab: float,
    outside_3N: Float64,
) -> None:
    """Log tails, entropies where there are numbers of them, and shifts."""
    for row in range(len(sizes_N)):
        outside_3N[0, row], outside_3N[2, row], likely = outside(
            tails_N[row], logs[least_N[row]], sizes_N[row], powers_2N[0, row], powers_2N[1, row], log_vocab
        )
        if len(entropies_N):
            folded = entropies_N[row]
            outside_3N[1, row] = likely + ((folded >> 1) ^ -(folded & 1)) / ENTROPY_SCALE


@compiled
def fill_entries(
    keys_NK: Keys, logs: Float64, shift_N: Float64, ids_NK: NDArray[np.int32], logprobs_NK: Float32
) -> None:
    for row in range(np.uint64(len(keys_NK))):
        for place in range(np.uint64(keys_NK.shape[1])):
            key = keys_NK[row, place]
            if key == 0xFFFFFFFF:
                ids_NK[row, place], logprobs_NK[row, place] = -1, -np.inf
            else:
                ids_NK[row, place] = key & np.uint32(0xFFFFFF)
                logprobs_NK[row, place] = logs[np.uint64(254) - np.uint64(key >> np.uint32(24))] + shift_N[row]
