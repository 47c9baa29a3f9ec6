"""Codec "topk-planes/1": an exact top-k of fixed k, as byte planes.

- Ids are exact: sorted, stored as gaps.
- A log-probability becomes the nearest of 256 levels, spaced evenly in sqrt(p) down to 3/240, by a factor 0.55 below
  that, the last at e^-30. An error d of sqrt(p) costs about 2 d^2 of KL whatever p is, so even spacing spends the bits
  where the KL needs them. KL over head and tail: k / (6 * 240^2) where the even levels are used, never above 5e-5 k.
- The tail is stored as log(tail / head) and decoded probabilities are scaled to sum to the head, so that head and tail
  sum to 1 and both are accurate however small either is: |error of log(tail / head)| <= 1/256.
- |error of the entropy| <= 1/2048 nat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shards import byte_planes
from shards.attention_planes import decode_attention, encode_attention
from shards.contract import Contract
from shards.errors import Corrupt, UnknownVersion
from shards.record import AttentionSummary, Float32, Int32, Record
from shards.signal import Signal

Float64 = NDArray[np.float64]

EVEN_STEPS, EVEN_LEVELS, FACTOR, LEVELS = 240, 238, 0.55, 256
TAIL_SCALE, TAIL_ZERO, NO_TAIL = 128, 1 << 15, 0
ENTROPY_SCALE = 1024
MOST_CODE = (1 << 16) - 1


def level_roots() -> Float64:
    """sqrt(p) of every level, falling from 1."""
    even = 1 - np.arange(EVEN_LEVELS) / EVEN_STEPS
    below = even[-1] * FACTOR ** np.arange(1, LEVELS - EVEN_LEVELS + 1)
    return np.concatenate([even, below])


_ROOTS = level_roots()
_PROBABILITIES = _ROOTS**2
_LOGPROBS = 2 * np.log(_ROOTS)
_BORDERS = -(_ROOTS[1:] + _ROOTS[:-1]) / 2
"""Halfway between levels, negated: searchsorted wants them rising."""


class TopkPlanes1:
    name: ClassVar[str] = "topk-planes/1"

    def __init__(self, contract: Contract, tables: bytes | None) -> None:
        rows = None if contract.attention is None else contract.attention.rows
        if contract.selection.kind != "topk" or contract.curve or tables or rows == "all":
            raise UnknownVersion(
                f"codec {self.name!r} carries a top-k and attention of response rows only, not what its contract says",
                hint="upgrade minicodformer, or write the shards again",
            )
        self._contract = contract
        self._id_planes = byte_planes.planes_for(contract.vocab_size - 1)

    def encode_signals(self, records: Sequence[Record]) -> list[bytes]:
        ids_NK = np.concatenate([record.ids_NK for record in records])
        logprobs_NK = np.concatenate([_logprobs(record) for record in records]).astype(np.float64)
        log_tail_N = np.concatenate([record.log_tail_N for record in records]).astype(np.float64)
        entropy_N = np.concatenate([record.entropy_N for record in records]).astype(np.float64)

        gaps_NK, levels_NK = _sorted_gaps(ids_NK, _nearest_levels(logprobs_NK))
        id_planes = byte_planes.split(gaps_NK, self._id_planes)
        scalars = [
            *byte_planes.split(_tail_codes(logprobs_NK, log_tail_N), 2),
            *byte_planes.split(np.clip(np.rint(entropy_N * ENTROPY_SCALE), 0, MOST_CODE).astype(np.int32), 2),
        ]
        cells, start = [], 0
        for record in records:
            rows = slice(start, start + record.positions)
            start += record.positions
            streams = [plane[rows].tobytes() for plane in (*id_planes, levels_NK)]
            cells.append(byte_planes.pack([*streams, b"".join(plane[rows].tobytes() for plane in scalars)]))
        return cells

    def decode_signal(self, cell: bytes | memoryview, *, labels_N: Int32, entries: int) -> Signal:
        positions = len(labels_N)
        if entries != positions * self._contract.selection.k:
            raise Corrupt(f"{entries} kept ids at {positions} positions are not k = {self._contract.selection.k} each")
        *id_planes, levels, scalars = byte_planes.unpack(cell, [entries] * (self._id_planes + 1) + [4 * positions])
        rising_NK = _from_gaps(byte_planes.join(id_planes).reshape(positions, -1), self._contract.vocab_size)
        ids_NK, levels_NK = _by_falling_probability(rising_NK, levels.reshape(positions, -1))

        tail_low, tail_high, entropy_low, entropy_high = scalars.reshape(4, positions)
        log_tail_N, log_head_N = _log_masses(byte_planes.join([tail_low, tail_high]))
        scale_N = log_head_N - np.log(_PROBABILITIES[levels_NK].sum(axis=1))
        return Signal(
            ids_NK=ids_NK,
            logprobs_NK=(_LOGPROBS[levels_NK] + scale_N[:, None]).astype(np.float32),
            log_tail_N=log_tail_N.astype(np.float32),
            entropy_N=(byte_planes.join([entropy_low, entropy_high]) / ENTROPY_SCALE).astype(np.float32),
        )

    def encode_attention(self, record: Record) -> bytes:
        assert record.attention is not None, "a valid record has what its contract says"
        return encode_attention(record.attention, prompt_length=len(record.prompt_ids_P))

    def decode_attention(self, cell: bytes | memoryview, *, positions: int, prompt_length: int) -> AttentionSummary:
        assert self._contract.attention is not None, "only a contract with attention has the column"
        return decode_attention(cell, self._contract.attention, positions=positions, prompt_length=prompt_length)


def _logprobs(record: Record) -> Float32:
    assert record.logprobs_NK is not None, "a valid record has what its contract says"
    return record.logprobs_NK


def _nearest_levels(logprobs_NK: Float64) -> NDArray[np.uint32]:
    return np.searchsorted(_BORDERS, -np.exp(logprobs_NK / 2)).astype(np.uint32)


def _sorted_gaps(
    ids_NK: NDArray[np.int32], levels_NK: NDArray[np.uint32]
) -> tuple[NDArray[np.integer], NDArray[np.uint8]]:
    """Ids in rising order as gaps (first id; then id - previous - 1), and their levels in the same order."""
    keys_NK = np.sort(ids_NK.astype(np.uint32) << 8 | levels_NK, axis=1)
    sorted_NK = keys_NK >> 8
    gaps_NK = sorted_NK.copy()
    gaps_NK[:, 1:] -= sorted_NK[:, :-1] + 1
    return gaps_NK, keys_NK.astype(np.uint8)


def _from_gaps(gaps_NK: NDArray[np.int32], vocab_size: int) -> NDArray[np.uint32]:
    ids_NK = np.cumsum(gaps_NK, axis=1, dtype=np.int64)
    ids_NK += np.arange(gaps_NK.shape[1])
    if ids_NK.size and ids_NK[:, -1].max() >= vocab_size:
        raise Corrupt(f"a payload names id {ids_NK[:, -1].max()}, outside a vocabulary of {vocab_size}")
    return ids_NK.astype(np.uint32)


def _by_falling_probability(
    ids_NK: NDArray[np.uint32], levels_NK: NDArray[np.uint8]
) -> tuple[NDArray[np.int32], NDArray[np.integer]]:
    """Both sorted by falling probability, which is rising level; equal levels by rising id."""
    keys_NK = np.sort(levels_NK.astype(np.uint32) << 24 | ids_NK, axis=1)
    return (keys_NK & 0xFFFFFF).astype(np.int32), keys_NK >> 24


def _tail_codes(logprobs_NK: Float64, log_tail_N: Float64) -> NDArray[np.int32]:
    log_head_N = np.log(np.exp(logprobs_NK).sum(axis=1))
    codes_N = TAIL_ZERO + np.rint(TAIL_SCALE * (log_tail_N - log_head_N))
    return np.where(np.isneginf(log_tail_N), NO_TAIL, np.clip(codes_N, NO_TAIL + 1, MOST_CODE)).astype(np.int32)


def _log_masses(tail_codes_N: NDArray[np.int32]) -> tuple[Float64, Float64]:
    """(log tail, log head), whose exponentials sum to 1."""
    log_odds_N = (tail_codes_N - TAIL_ZERO) / TAIL_SCALE
    log_odds_N[tail_codes_N == NO_TAIL] = -np.inf
    return -np.logaddexp(0, -log_odds_N), -np.logaddexp(0, log_odds_N)
