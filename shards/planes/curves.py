"""The partition curve of the tails: differences from the tail's mass and from node to node.

Values rise from log tail and slopes fall from 0 as the exponent falls: steps are not negative, but the first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.planes.numbers import unzigzag, zigzag
from shards.planes.rans import Reader, Stream

Float64 = NDArray[np.float64]

VALUE_SCALE, SLOPE_SCALE = 1024, 256
_FARTHEST = (1 << 23) - 1
"""Steps of the curve at most; no distribution in single precision needs as many."""


def curve_streams(curve_NJ: Float64, log_tail_N: Float64) -> list[Stream]:
    """The streams of a curve, with the log tails that will be decoded."""
    there_N = ~np.isneginf(log_tail_N)
    curve_NJ, before_N = curve_NJ[there_N], log_tail_N[there_N]
    nodes, streams = curve_NJ.shape[1] // 2, []
    for node in range(nodes):
        least = -_FARTHEST if node == 0 else 0
        steps_N = np.rint(VALUE_SCALE * (curve_NJ[:, node] - before_N)).clip(least, _FARTHEST).astype(np.int32)
        streams.append(Stream("values", zigzag(steps_N) if node == 0 else steps_N, int(node > 0)))
        before_N = before_N + steps_N / VALUE_SCALE
    before_N = np.zeros(len(curve_NJ))
    for node in range(nodes):
        steps_N = np.rint(SLOPE_SCALE * (before_N - curve_NJ[:, nodes + node])).clip(0, _FARTHEST).astype(np.int32)
        streams.append(Stream("slopes", steps_N, int(node > 0)))
        before_N = before_N - steps_N / SLOPE_SCALE
    return streams


def read_curve(reader: Reader, log_tail_N: Float64, nodes: int) -> Float64:
    """The inverse of `curve_streams`; values are -inf and slopes 0 where nothing is left."""
    there_N = ~np.isneginf(log_tail_N)
    curve_NJ = np.tile(np.repeat([-np.inf, 0.0], nodes), (len(log_tail_N), 1))
    columns, before_N = [], log_tail_N[there_N]
    for node in range(nodes):
        numbers_N = reader.take("values", len(before_N), int(node > 0))
        before_N = before_N + (unzigzag(numbers_N) if node == 0 else numbers_N) / VALUE_SCALE
        columns.append(before_N)
    before_N = np.zeros(len(before_N))
    for node in range(nodes):
        before_N = before_N - reader.take("slopes", len(before_N), int(node > 0)) / SLOPE_SCALE
        columns.append(before_N)
    curve_NJ[there_N] = np.stack(columns, axis=1)
    return curve_NJ
