"""What lies outside the exact head, as differences from what the head makes likely: tail mass, entropy, curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.planes.draws import Draws
from shards.planes.head import Head
from shards.planes.numbers import Numbers, unzigzag, zigzag
from shards.planes.streams import StreamReader, Streams

Float64 = NDArray[np.float64]

TAIL_SCALE, TAIL_GUESS, NO_TAIL, MOST = 64, 1 / 3, 0, 60_000
ENTROPY_SCALE = 256
VALUE_SCALE, SLOPE_SCALE = 1024, 256
_FARTHEST = (1 << 23) - 1
"""Steps of the curve at most; no distribution in single precision needs as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """N positions; the curve is None where the contract has none."""

    log_head_N: Float64
    log_tail_N: Float64
    """-inf where nothing is left. Where the tail is not known, what the kept ids leave."""
    entropy_N: Float64 | None
    """None where the tail is not known."""
    curve_NJ: Float64 | None


def outside_streams(outside: Outside, kept: Head | Draws, vocab_size: int) -> Streams:
    """Streams of the masses, where a head was kept, of the entropy and of the curve."""
    log_head_N, log_tail_N = outside.log_head_N, outside.log_tail_N
    if isinstance(kept, Head):
        steps_N = np.rint(TAIL_SCALE * (log_tail_N - log_head_N - _odds_guess_N(kept))).clip(-MOST, MOST)
        numbers_N = np.where(np.isneginf(log_tail_N), NO_TAIL, 1 + zigzag(np.nan_to_num(steps_N).astype(np.int32)))
        yield "tail", numbers_N
        log_head_N, log_tail_N = _masses(numbers_N.astype(np.int32), kept)
    if outside.entropy_N is not None:
        guess_N = _entropy_guess_N(kept, log_head_N, log_tail_N, vocab_size)
        yield "entropy", zigzag(np.rint(ENTROPY_SCALE * (outside.entropy_N - guess_N)).astype(np.int32))
    if outside.curve_NJ is not None:
        there_N = ~np.isneginf(log_tail_N)
        yield from _curve_streams(outside.curve_NJ[there_N], log_tail_N[there_N])


def read_outside(
    reader: StreamReader, kept: Head | Draws, *, positions: int, vocab_size: int, tail_known: bool, nodes: int
) -> Outside:
    """The inverse of `outside_streams`. Raises Corrupt."""
    log_head_N, log_tail_N = np.full(positions, -np.inf), np.zeros(positions)
    if isinstance(kept, Head):
        log_head_N, log_tail_N = _masses(reader.take("tail", positions), kept)
    entropy_N = curve_NJ = None
    if tail_known:
        guess_N = _entropy_guess_N(kept, log_head_N, log_tail_N, vocab_size)
        entropy_N = guess_N + unzigzag(reader.take("entropy", positions)) / ENTROPY_SCALE
    if nodes:
        there_N = ~np.isneginf(log_tail_N)
        curve_NJ = np.tile(np.repeat([-np.inf, 0.0], nodes), (positions, 1))
        curve_NJ[there_N] = _read_curve(reader, log_tail_N[there_N], nodes)
    return Outside(log_head_N=log_head_N, log_tail_N=log_tail_N, entropy_N=entropy_N, curve_NJ=curve_NJ)


def _odds_guess_N(head: Head) -> Float64:
    """log(tail / head) if the tail weighed about as much as the head's least entry times its size."""
    guess_N: Float64 = head.least_log_N + np.log(head.sizes_N / head.power_N) + TAIL_GUESS
    return guess_N


def _masses(numbers_N: Numbers, head: Head) -> tuple[Float64, Float64]:
    """(log head, log tail), whose exponentials sum to 1."""
    odds_N = unzigzag(np.maximum(numbers_N - 1, 0)) / TAIL_SCALE + _odds_guess_N(head)
    odds_N[numbers_N == NO_TAIL] = -np.inf
    return -np.logaddexp(0, odds_N), -np.logaddexp(0, -odds_N)


def _entropy_guess_N(kept: Head | Draws, log_head_N: Float64, log_tail_N: Float64, vocab_size: int) -> Float64:
    """The entropy if the tail were spread evenly over about a third of the vocabulary; without a head, from counts."""
    if isinstance(kept, Draws):
        return kept.entropy_guess_N()
    tail_N = np.exp(log_tail_N)
    shift_N = log_head_N - np.log(kept.power_N)
    head_N = np.exp(shift_N) * (kept.moment_N + shift_N * kept.power_N)
    guess_N: Float64 = tail_N * (np.log(vocab_size) - 1 - np.where(tail_N > 0, log_tail_N, 0)) - head_N
    return guess_N


def _curve_streams(curve_NJ: Float64, log_tail_N: Float64) -> Streams:
    """Values rise from log tail and slopes fall from 0 as the exponent falls: steps are not negative, but the first."""
    nodes = curve_NJ.shape[1] // 2
    before_N = log_tail_N
    for node in range(nodes):
        least = -_FARTHEST if node == 0 else 0
        steps_N = np.rint(VALUE_SCALE * (curve_NJ[:, node] - before_N)).clip(least, _FARTHEST).astype(np.int32)
        yield f"values{node > 0:d}", zigzag(steps_N) if node == 0 else steps_N
        before_N = before_N + steps_N / VALUE_SCALE
    before_N = np.zeros(len(curve_NJ))
    for node in range(nodes):
        steps_N = np.rint(SLOPE_SCALE * (before_N - curve_NJ[:, nodes + node])).clip(0, _FARTHEST)
        yield f"slopes{node > 0:d}", steps_N.astype(np.int32)
        before_N = before_N - steps_N / SLOPE_SCALE


def _read_curve(reader: StreamReader, log_tail_N: Float64, nodes: int) -> Float64:
    columns, before_N = [], log_tail_N
    for node in range(nodes):
        numbers_N = reader.take(f"values{node > 0:d}", len(log_tail_N))
        before_N = before_N + (unzigzag(numbers_N) if node == 0 else numbers_N) / VALUE_SCALE
        columns.append(before_N)
    before_N = np.zeros(len(log_tail_N))
    for node in range(nodes):
        before_N = before_N - reader.take(f"slopes{node > 0:d}", len(log_tail_N)) / SLOPE_SCALE
        columns.append(before_N)
    return np.stack(columns, axis=1)
