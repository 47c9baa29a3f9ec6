"""What is taken of rows of logits on a CPU, as compiled loops over the bits of float32 or bfloat16 numbers.

Tensor operations write out every step, and memory is slow: cast, maxima, differences, exponentials and sums of rows as
wide as a vocabulary cost more than the matrix product where that has tile units. Here each loop reads a row once.

`bits` are unsigned integers, and `bits << shift` those of a float32: shift 0 for float32 itself, 16 for bfloat16.
Columns from `width` on are the padding of the vocabulary and are not read. Sums do not depend on how wide the
processor's registers are.

Shape suffixes as in `shards.record`; besides, P is the padded width and C counts candidates or blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from stages.teacher_cache.draws import BLOCK as MASS_BLOCK

_MAXIMA_BLOCK, _HALF_BLOCK, _LANES = 64, MASS_BLOCK // 2, MASS_BLOCK // 8
_LEAST_KEY = np.int32(-(2**31))
_KEY_BITS, _LAST_COLUMN = np.int32(0x7FFFFFFF), 0x7FFFFFFF
_LOWEST_LOGIT = np.uint32(0xFF7F0000)
"""The lowest finite bfloat16: 0 times it is 0."""
_NOTHING = np.float32(-1e4)
"""Differences are cut off here, where every power is 0 already, so that 0 times them is 0 and not NaN."""

_ONE, _HALF, _LOG2_E = np.float32(1), np.float32(0.5), np.float32(1.4426950408889634)
_LOWEST = np.float32(-88)
"""Its exponential rounds to 0 below."""
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2 in two parts; the first times a whole number below 2^15 is exact."""
_EXP_2, _EXP_3, _EXP_4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_EXP_5, _EXP_6, _EXP_7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
"""Coefficients of e^y for |y| <= ln(2) / 2, from the Cephes library's expf (Moshier)."""


@compiled
def select_largest(
    bits_NP: NDArray[Any], shift: int, width: int, values_NK: NDArray[np.float32], columns_NK: NDArray[np.int64]
) -> None:
    """The K largest logits of each row by falling value, and their columns; equal values by rising column.

    Exact: what is smaller than the K-th largest of all blocks' maxima is smaller than K logits. A NaN counts as larger
    than any number. Numbers are compared as integers of the same order, in which -0 stands for 0.
    """
    rows, largest = values_NK.shape
    blocks = (width + _MAXIMA_BLOCK - 1) // _MAXIMA_BLOCK
    maxima = np.empty(blocks, np.int32)
    # Fewer than K blocks hold a logit above the K-th maximum; of those equal to it the first K are enough.
    room = np.empty((_MAXIMA_BLOCK + 1) * largest, np.int64)
    by = np.uint32(shift)
    for row in range(rows):
        for block in range(blocks):
            chunk = bits_NP[row, block * _MAXIMA_BLOCK : min((block + 1) * _MAXIMA_BLOCK, width)]
            most = _LEAST_KEY
            for index in range(len(chunk)):
                signed = np.int32(np.uint32(chunk[index]) << by)
                key = np.int32(signed ^ (np.int32(signed >> np.int32(31)) & _KEY_BITS))
                most = key if key > most else most
            maxima[block] = np.int32(0) if most == -1 else most
        least = _LEAST_KEY
        if blocks > largest:
            least = np.partition(maxima, blocks - largest)[blocks - largest]
        lowest = np.int32(-1) if least == 0 else least
        found = equal = 0
        for block in range(blocks):
            if maxima[block] < least:
                continue
            chunk = bits_NP[row, block * _MAXIMA_BLOCK : min((block + 1) * _MAXIMA_BLOCK, width)]
            for index in range(len(chunk)):
                signed = np.int32(np.uint32(chunk[index]) << by)
                key = np.int32(signed ^ (np.int32(signed >> np.int32(31)) & _KEY_BITS))
                if key < lowest:
                    continue
                key = np.int32(0) if key == -1 else key
                equal += key == least
                if key == least and equal > largest:
                    continue
                room[found] = (np.int64(key) << 32) | (_LAST_COLUMN - block * _MAXIMA_BLOCK - index)
                found += 1
        order = np.sort(room[:found])
        for index in range(largest):
            column = _LAST_COLUMN - (order[found - 1 - index] & _LAST_COLUMN)
            columns_NK[row, index] = column
            values_NK[row, index] = np.uint32(np.uint32(bits_NP[row, column]) << by).view(np.float32)


@compiled
def sum_tails(
    bits_NP: NDArray[Any],
    shift: int,
    width: int,
    columns_NC: NDArray[np.int64],
    kept_NC: NDArray[np.bool_],
    reference_N: NDArray[np.float32],
    nodes_J: NDArray[np.float32],
    doubles_J: NDArray[np.bool_],
    sums_NJ2: NDArray[np.float64],
    masses_NC: NDArray[np.float64],
) -> None:
    """Make the kept of `columns_NC` as low as can be, in place, and sum e^(b d) and d e^(b d), d = logit - reference.

    `nodes_J` are the powers b, rising to 1; where `doubles_J` one is twice that before it and its exponential is
    the square. `masses_NC`, unless it has no columns, receives the sums of e^d over blocks of MASS_BLOCK columns.
    An exponential is right to 2^-23 of itself, or 0 where that is below e^-87.6; sums of more than 8 are float64.
    """
    rows, powers = sums_NJ2.shape[:2]
    delta, power = np.empty(MASS_BLOCK, np.float32), np.empty(MASS_BLOCK, np.float32)
    zeroth, first = np.empty(_HALF_BLOCK, np.float32), np.empty(_HALF_BLOCK, np.float32)
    lanes = np.empty((powers, 2, _LANES), np.float64)
    by = np.uint32(shift)
    for row in range(rows):
        for index in range(columns_NC.shape[1]):
            if kept_NC[row, index]:
                bits_NP[row, columns_NC[row, index]] = _LOWEST_LOGIT >> by
        lanes[:] = 0
        reference = reference_N[row]
        for start in range(0, width, MASS_BLOCK):
            chunk = bits_NP[row, start : min(start + MASS_BLOCK, width)]
            for index in range(len(chunk)):
                above = np.uint32(np.uint32(chunk[index]) << by).view(np.float32) - reference
                delta[index] = _NOTHING if above < _NOTHING else above  # a NaN stays one
            for index in range(len(chunk), MASS_BLOCK):
                delta[index] = _NOTHING
            for node in range(powers):
                if doubles_J[node]:
                    for index in range(MASS_BLOCK):
                        power[index] = power[index] * power[index]
                else:
                    exponent = nodes_J[node]
                    for index in range(MASS_BLOCK):
                        x = exponent * delta[index]
                        x = _LOWEST if x < _LOWEST else x
                        whole = np.int32(x * _LOG2_E - _HALF)
                        y = x - np.float32(whole) * _LN2_HIGH - np.float32(whole) * _LN2_LOW
                        series = ((_EXP_7 * y + _EXP_6) * y + _EXP_5) * y + _EXP_4
                        series = ((series * y + _EXP_3) * y + _EXP_2) * (y * y) + y + _ONE
                        power[index] = series * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
                # Halves onto halves: sums of single precision whose order no compiler has to change to use lanes.
                for index in range(_HALF_BLOCK):
                    zeroth[index] = power[index] + power[index + _HALF_BLOCK]
                    first[index] = power[index] * delta[index] + power[index + _HALF_BLOCK] * delta[index + _HALF_BLOCK]
                for index in range(2 * _LANES):
                    zeroth[index] += zeroth[index + 2 * _LANES]
                    first[index] += first[index + 2 * _LANES]
                for index in range(_LANES):
                    zeroth[index] += zeroth[index + _LANES]
                    first[index] += first[index + _LANES]
                    lanes[node, 0, index] += zeroth[index]
                    lanes[node, 1, index] += first[index]
                if masses_NC.shape[1] and node == powers - 1:
                    masses_NC[row, start // MASS_BLOCK] = zeroth[:_LANES].astype(np.float64).sum()
        for node in range(powers):
            for part in range(2):
                sums_NJ2[row, node, part] = lanes[node, part].sum()
