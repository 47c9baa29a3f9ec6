"""The compiled passes over the heads of N positions; see `head.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.planes.levels import nearest_level
from shards.planes.numbers import Numbers
from shards.planes.rans import Contexts, Index, Rows

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Keys = NDArray[np.uint32]


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
    for row in range(len(ids_NK)):
        size = 0
        least: Index = 255
        kept: Index = -1
        for place in range(ids_NK.shape[1]):
            id_ = ids_NK[row, place]
            keys_NK[row, place] = 0xFFFFFFFF
            if id_ >= 0:
                level = nearest_level(np.float64(roots_NK[row, place]) * steps, borders, highest)
                size += 1
                least = level if level < least else least
                if id_ == labels_N[row]:
                    kept = level
                else:
                    keys_NK[row, place] = ranks_CV[classes_N[row], id_] << np.uint32(8) | np.uint32(level)
        sizes_N[row], least_N[row], kept_N[row] = size, least, kept - least + 1 if kept >= 0 else 0


@compiled
def _level_context(least: int, place: int) -> int:
    return 2 * ((least >= 18) + (least >= 23)) + (place >= 16)


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
def choose_rows(others_N: Numbers, least_N: Numbers, first: int, rows: Rows) -> None:
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
        odds = steps / 64 + least_log + np.log(size / power) + 1 / 3
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
            steps = 64 * (left - np.log(mass) - least_log - np.log(sizes_N[row] / power) - 1 / 3)
            number = 1 + _folded(min(max(steps, -60_000.0), 60_000.0))
        decoded_N[row], _, likely = _outside(number, least_log, sizes_N[row], power, moment, log_vocab)
        tail_numbers_N[row] = number
        if tail_known:
            entropy_numbers_N[row] = _folded(256 * (float(entropy_N[row]) - likely))


@compiled
def fill_keys(
    ranks: Numbers,
    numbers: Numbers,
    classes_N: Numbers,
    sizes_N: Numbers,
    least_N: Numbers,
    kept_N: Numbers,
    labels_N: Numbers,
    orders_CV: NDArray[np.int32],
    masses: Float64,
    moments: Float64,
    logs: Float64,
    log_vocab: float,
    tail_known: bool,
    keys_NK: Keys,
    log_tail_N: Float64,
    entropy_N: Float64,
    shift_N: Float64,
) -> int:
    """Keys that rise as probabilities fall, and what lies outside. Returns the number of a fault, or 0.

    `numbers` are those of the levels, place by place, of the tails and of the entropies.
    """
    count, highest = len(sizes_N), len(masses)
    power_N, moment_N, others_N = np.zeros(count), np.zeros(count), np.empty(count, np.int64)
    for row in range(count):
        others_N[row] = sizes_N[row]
        if least_N[row] >= highest:
            return 1
        if kept_N[row] > 0:
            others_N[row] -= 1
            level = least_N[row] + kept_N[row] - 1
            if level >= highest:
                return 1
            keys_NK[row, others_N[row]] = np.uint32(254 - level) << np.uint32(24) | np.uint32(labels_N[row])
            power_N[row], moment_N[row] = masses[level], moments[level]
    index = 0
    for place in range(keys_NK.shape[1]):
        for row in range(count):
            if place < others_N[row]:
                id_, level = orders_CV[classes_N[row], ranks[index]], least_N[row] + numbers[index]
                if level >= highest:
                    return 1
                if id_ == labels_N[row]:
                    return 2
                index += 1
                keys_NK[row, place] = np.uint32(254 - level) << np.uint32(24) | np.uint32(id_)
                power_N[row] += masses[level]
                moment_N[row] += moments[level]
    for row in range(count):
        log_tail_N[row], shift_N[row], likely = _outside(
            numbers[index + row], logs[least_N[row]], sizes_N[row], power_N[row], moment_N[row], log_vocab
        )
        if tail_known:
            folded = numbers[index + count + row]
            entropy_N[row] = likely + ((folded >> 1) ^ -(folded & 1)) / 256
    return 0


@compiled
def fill_entries(
    keys_NK: Keys, logs: Float64, shift_N: Float64, ids_NK: NDArray[np.int32], logprobs_NK: Float32
) -> None:
    for row in range(len(keys_NK)):
        for place in range(keys_NK.shape[1]):
            key = keys_NK[row, place]
            if key == 0xFFFFFFFF:
                ids_NK[row, place], logprobs_NK[row, place] = -1, -np.inf
            else:
                ids_NK[row, place] = key & np.uint32(0xFFFFFF)
                logprobs_NK[row, place] = logs[254 - (key >> np.uint32(24))] + shift_N[row]
