"""The compiled passes over the heads of N positions; see `head.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.planes.id_sets import fill_places, fill_ranks
from shards.planes.levels import nearest_level
from shards.planes.numbers import Numbers
from shards.planes.rans import Bytes, Contexts, Index, Places, Rows, Slots, States, Words, decode

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Keys = NDArray[np.uint32]

_LOW_LEAST, _HIGH_LEAST, _LATE_PLACE = 18, 23, 16
"""Levels are coded in six contexts: by the least level of the position, and by the place of the id in its set."""
_TAIL_SCALE, _TAIL_GUESS, _MOST_STEPS = 64, 1 / 3, 60_000.0
"""Steps of log(tail / head) to a nat; how far beyond the least entry times the size it is likely to be; most steps."""
ENTROPY_SCALE = 256
"""Steps to a nat."""


@compiled
def take_keys(
    ids_NK: NDArray[np.int32],
    roots_NK: Float32,
    labels_N: Numbers,
    ranks_CV: NDArray[np.uint32],
    classes_N: Numbers,
    steps: int,
    borders: Float64,
    highest: NDArray[np.uint8],
    keys_NK: Keys,
    sizes_N: Numbers,
    least_N: Numbers,
    kept_N: Numbers,
) -> None:
    """Rank and level of each id but the label, which has its own number: 0 where it is not kept."""
    for row in range(np.uint64(len(ids_NK))):
        class_, label, size = np.uint64(classes_N[row]), labels_N[row], 0
        least: Index = 255
        kept: Index = -1
        for place in range(np.uint64(ids_NK.shape[1])):
            id_ = ids_NK[row, place]
            keys_NK[row, place] = 0xFFFFFFFF
            if id_ >= 0:
                level = nearest_level(np.float64(roots_NK[row, place]) * steps, borders, highest)
                size += 1
                least = min(level, least)
                if id_ == label:
                    kept = level
                else:
                    keys_NK[row, place] = ranks_CV[class_, np.uint64(id_)] << np.uint32(8) | np.uint32(level)
        sizes_N[row], least_N[row], kept_N[row] = size, least, kept - least + 1 if kept >= 0 else 0


@compiled
def _level_context(least: int, place: int) -> int:
    return 2 * ((least >= _LOW_LEAST) + (least >= _HIGH_LEAST)) + (place >= _LATE_PLACE)


@compiled
def take_levels(keys_NK: Keys, others_N: Numbers, least_N: Numbers, above: Numbers, contexts: Contexts) -> None:
    index = 0
    for place in range(keys_NK.shape[1]):
        for row in range(len(keys_NK)):
            if place < others_N[row]:
                above[index] = np.int64(keys_NK[row, place] & np.uint32(255)) - least_N[row]
                contexts[index] = _level_context(least_N[row], place)
                index += 1


@compiled
def _choose_rows(others_N: Numbers, least_N: Numbers, first: Index, rows: Rows) -> None:
    index, place, more = 0, 0, True
    while more:
        more = False
        for row in range(len(others_N)):
            if place < others_N[row]:
                rows[index] = first + _level_context(least_N[row], place)
                index += 1
                more = True
        place += 1


@compiled
def _outside(
    number: int, least_log: float, size: int, power: float, moment: float, log_vocab: float
) -> tuple[float, float, float]:
    """log tail, what brings log r^2 to log p, and the likely entropy.

    `power` and `moment` are the sums of r^2 and r^2 log r^2 over the head. The tail is likely to weigh as much as the
    head's least entry times its size, and to be spread evenly over about a third of the vocabulary.
    """
    log_head, log_tail, rest = 0.0, -np.inf, 0.0
    if number > 0:
        steps = number >> 1 if number & 1 else -(number >> 1)
        odds = steps / _TAIL_SCALE + least_log + np.log(size / power) + _TAIL_GUESS
        log_head, log_tail = -_softplus(odds), -_softplus(-odds)
        rest = np.exp(log_tail) * (log_vocab - 1 - log_tail)
    shift = log_head - np.log(power)
    return log_tail, shift, rest - np.exp(shift) * (moment + shift * power)


@compiled
def _softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + float(np.log1p(np.exp(-abs(x))))


@compiled
def _folded(steps: float) -> int:
    """Rounded; see `zigzag`."""
    rounded = int(np.rint(steps))
    return -2 * rounded - 1 if rounded < 0 else 2 * rounded


@compiled
def take_outside(
    roots_NK: Float32,
    keys_NK: Keys,
    sizes_N: Numbers,
    others_N: Numbers,
    least_N: Numbers,
    kept_N: Numbers,
    log_tail_N: Float32,
    entropy_N: Float32,
    masses: Float64,
    moments: Float64,
    logs: Float64,
    log_vocab: float,
    tail_known: bool,
    tail_numbers_N: Numbers,
    entropy_numbers_N: Numbers,
    decoded_N: Float64,
) -> None:
    """The numbers of tails and entropies, and the log tails that they will give."""
    for row in range(len(keys_NK)):
        mass = power = moment = 0.0
        for place in range(sizes_N[row]):
            mass += np.float64(roots_NK[row, place]) ** 2
        for place in range(others_N[row]):
            level = keys_NK[row, place] & np.uint32(255)
            power += masses[level]
            moment += moments[level]
        least_log = logs[least_N[row]]
        if kept_N[row] > 0:
            level = least_N[row] + kept_N[row] - 1
            power += masses[level]
            moment += moments[level]
        left = float(log_tail_N[row])
        if not tail_known:
            left = float(np.log(1 - mass)) if mass < 1 else -np.inf
        number = 0
        if left > -np.inf:
            steps = _TAIL_SCALE * (left - np.log(mass) - least_log - np.log(sizes_N[row] / power) - _TAIL_GUESS)
            number = 1 + _folded(min(max(steps, -_MOST_STEPS), _MOST_STEPS))
        decoded_N[row], _, likely = _outside(number, least_log, sizes_N[row], power, moment, log_vocab)
        tail_numbers_N[row] = number
        if tail_known:
            entropy_numbers_N[row] = _folded(ENTROPY_SCALE * (float(entropy_N[row]) - likely))


@compiled
def read_keys(
    words: Words,
    sides: Bytes,
    states: States,
    places: Places,
    slots: Slots,
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
        words, sides, states, places, slots, rows_8, count, classes, k, most, sized
    )
    if fault:
        return fault, held, classes_N, none[0], none[1]
    ranks_KN, above_KN = np.zeros((others, count), np.int32), np.zeros((others, count), np.int32)
    if not fill_ranks(
        words, sides, states, places, slots, rows_8[4], next_steps, left_steps, others_N, bound, ranks_KN
    ):
        return 3, held, classes_N, none[0], none[1]
    leveled = np.int64(others_N.sum())
    rows = np.empty(leveled + (1 + tail_known) * count, np.uint16)
    _choose_rows(others_N, least_N, rows_8[5], rows)
    rows[leveled : leveled + count] = rows_8[6]
    rows[leveled + count :] = rows_8[7]
    numbers = np.empty(len(rows), np.int32)
    decode(words, sides, states, places, slots, rows, numbers)
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
    words: Words,
    sides: Bytes,
    states: States,
    places: Places,
    slots: Slots,
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
    classes_N = _take(words, sides, states, places, slots, rows_8[0], count)
    sizes_N = np.full(count, k - 1, np.int32)
    if sized:
        sizes_N = _take(words, sides, states, places, slots, rows_8[1], count)
    least_N = _take(words, sides, states, places, slots, rows_8[2], count)
    kept_N = _take(words, sides, states, places, slots, rows_8[3], count)
    others_N, known = np.empty(count, np.int32), True
    for row in range(count):
        sizes_N[row] += 1
        others_N[row] = sizes_N[row] - (kept_N[row] > 0)
        held, width, others = held + sizes_N[row], max(width, sizes_N[row]), max(others, others_N[row])
        known &= classes_N[row] < classes
    fault = 1 if not known else 2 if width > k or width * count > most else 0
    return fault, (held, width, others), (classes_N, sizes_N, others_N, least_N, kept_N)


@compiled
def _take(words: Words, sides: Bytes, states: States, places: Places, slots: Slots, row: Index, count: int) -> Numbers:
    """A stream of one code."""
    rows, numbers = np.full(count, row, np.uint16), np.empty(count, np.int32)
    decode(words, sides, states, places, slots, rows, numbers)
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
        outside_3N[0, row], outside_3N[2, row], likely = _outside(
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
