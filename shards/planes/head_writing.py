"""The compiled passes that make streams of the heads of N positions; see `head.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.planes.levels import nearest_level
from shards.planes.numbers import Numbers
from shards.planes.rans import Contexts, Index

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
def level_context(least: Index, place: Index) -> Index:
    return 2 * ((least >= _LOW_LEAST) + (least >= _HIGH_LEAST)) + (place >= _LATE_PLACE)


@compiled
def take_levels(keys_NK: Keys, others_N: Numbers, least_N: Numbers, above: Numbers, contexts: Contexts) -> None:
    index = np.uint64(0)
    for place in range(np.uint64(keys_NK.shape[1])):
        for row in range(np.uint64(len(keys_NK))):
            if np.int64(place) < others_N[row]:
                above[index] = np.int64(keys_NK[row, place] & np.uint32(255)) - least_N[row]
                contexts[index] = level_context(least_N[row], np.int64(place))
                index += np.uint64(1)


@compiled
def outside(
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
        decoded_N[row], _, likely = outside(number, least_log, sizes_N[row], power, moment, log_vocab)
        tail_numbers_N[row] = number
        if tail_known:
            entropy_numbers_N[row] = _folded(ENTROPY_SCALE * (float(entropy_N[row]) - likely))
