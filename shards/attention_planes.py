"""The attention cell of codec "topk-planes/1".

With m = min(M, P - 1) keys kept a row:
- key positions are exact: sorted, stored as gaps;
- a weight's share s of the row's prompt mass is stored as round(63 sqrt(s)): |error of sqrt(s)| <= 1/126 before the
  shares are scaled down to sum to at most 1, or to exactly 1 where every prompt key is kept;
- |error of sink and prompt mass| <= 1/131070, |error of the entropy| <= 1/2048 nat.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards import byte_planes
from shards.contract import AttentionSpec
from shards.errors import Corrupt
from shards.record import AttentionSummary

SHARE_LEVELS = 63
MASS_SCALE = (1 << 16) - 1
ENTROPY_SCALE = 1024


def encode_attention(summary: AttentionSummary, *, prompt_length: int) -> bytes:
    """The cell of a valid summary."""
    kept = min(summary.positions_LNM.shape[-1], prompt_length - 1)
    positions_LNM = summary.positions_LNM[..., :kept].astype(np.uint32)
    keys_LNM = np.sort(positions_LNM << 8 | _share_codes(summary.weights_LNM[..., :kept], summary.prompt_LN), axis=-1)
    sorted_LNM = keys_LNM >> 8
    gaps_LNM = sorted_LNM - 1
    gaps_LNM[..., 1:] -= sorted_LNM[..., :-1]
    scalars_LN = (
        _codes(summary.sink_LN, MASS_SCALE),
        _codes(summary.prompt_LN, MASS_SCALE),
        _codes(summary.entropy_LN, ENTROPY_SCALE),
    )
    streams = [*byte_planes.split(gaps_LNM, byte_planes.planes_for(prompt_length - 1)), keys_LNM.astype(np.uint8)]
    scalar_planes = [plane.tobytes() for codes_LN in scalars_LN for plane in byte_planes.split(codes_LN, 2)]
    return byte_planes.pack([*(stream.tobytes() for stream in streams), b"".join(scalar_planes)])


def decode_attention(
    cell: bytes | memoryview, spec: AttentionSpec, *, positions: int, prompt_length: int
) -> AttentionSummary:
    """The summary of a cell. Raises Corrupt."""
    layers, kept = len(spec.layers), min(spec.top_m, prompt_length - 1)
    rows, width = layers * positions, byte_planes.planes_for(prompt_length - 1)
    *gap_planes, codes, scalars = byte_planes.unpack(cell, [rows * kept] * (width + 1) + [6 * rows])
    if codes.size and codes.max() > SHARE_LEVELS:
        raise Corrupt(f"a payload names share {codes.max()} of {SHARE_LEVELS}")
    sorted_LNM = np.cumsum(byte_planes.join(gap_planes).reshape(layers, positions, kept), axis=-1, dtype=np.int64)
    sorted_LNM += np.arange(1, kept + 1)
    if sorted_LNM.size and sorted_LNM[..., -1].max() >= prompt_length:
        raise Corrupt(f"a payload names key {sorted_LNM[..., -1].max()} of a prompt of {prompt_length} tokens")
    falling_LNM = SHARE_LEVELS - codes.reshape(layers, positions, kept).astype(np.uint32)
    keys_LNM = np.sort(falling_LNM << 24 | sorted_LNM.astype(np.uint32), axis=-1)

    low_high = scalars.reshape(3, 2, layers, positions)
    sink_LN, prompt_LN, entropy_LN = (byte_planes.join(list(pair)) for pair in low_high)
    shares_LNM = _shares(SHARE_LEVELS - (keys_LNM >> 24), all_kept=kept == prompt_length - 1)
    positions_LNM = np.full((layers, positions, spec.top_m), -1, np.int32)
    positions_LNM[..., :kept] = keys_LNM & 0xFFFFFF
    weights_LNM = np.zeros((layers, positions, spec.top_m), np.float32)
    weights_LNM[..., :kept] = shares_LNM * (prompt_LN / MASS_SCALE)[..., None]
    return AttentionSummary(
        positions_LNM=positions_LNM,
        weights_LNM=weights_LNM,
        sink_LN=(sink_LN / MASS_SCALE).astype(np.float32),
        prompt_LN=(prompt_LN / MASS_SCALE).astype(np.float32),
        entropy_LN=(entropy_LN / ENTROPY_SCALE).astype(np.float32),
    )


def _share_codes(weights_LNM: NDArray[np.float32], prompt_LN: NDArray[np.float32]) -> NDArray[np.uint32]:
    prompt_LN1 = prompt_LN[..., None].astype(np.float64)
    share_LNM = np.zeros(weights_LNM.shape)
    np.divide(weights_LNM, prompt_LN1, out=share_LNM, where=prompt_LN1 > 0)
    codes_LNM: NDArray[np.uint32] = np.rint(SHARE_LEVELS * np.sqrt(share_LNM.clip(0, 1))).astype(np.uint32)
    return codes_LNM


def _shares(codes_LNM: NDArray[np.integer], *, all_kept: bool) -> NDArray[np.float64]:
    shares_LNM: NDArray[np.float64] = (codes_LNM / SHARE_LEVELS) ** 2
    total_LN1 = shares_LNM.sum(axis=-1, keepdims=True)
    shares_LNM /= np.where(total_LN1 > 0, total_LN1, 1) if all_kept else np.maximum(total_LN1, 1)
    return shares_LNM


def _codes(values: NDArray[np.float32], scale: int) -> NDArray[np.int32]:
    return np.rint(values.astype(np.float64) * scale).clip(0, (1 << 16) - 1).astype(np.int32)
