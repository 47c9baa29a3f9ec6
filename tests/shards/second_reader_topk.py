"""Sections 5 and 6 of FORMAT.md, codec `topk-planes/1`, read without `shards`."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import zstandard


def streams(cell: bytes, sizes: list[int]) -> list[np.ndarray]:
    """Section 5, first paragraph."""
    compressed = struct.unpack_from(f"<{len(sizes)}I", cell)
    start, found = 4 * len(sizes), []
    for size, frame_size in zip(sizes, compressed, strict=True):
        frame = cell[start : start + frame_size]
        assert zstandard.frame_content_size(frame) == size
        found.append(np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8).astype(np.int64))
        start += frame_size
    assert start == len(cell)
    return found


def planes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def number(parts: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for index, part in enumerate(parts):
        total = total + part * 256**index
    return total


def decode_signal(cell: bytes, contract: dict[str, Any], positions: int) -> dict[str, np.ndarray]:
    """Section 5, entry by entry."""
    k = contract["k"] if contract["format_version"] == 1 else contract["selection"]["k"]
    width = planes(contract["vocab_size"] - 1)
    parts = streams(cell, [positions * k] * (width + 1) + [4 * positions])
    gaps, levels = number(parts[:width]).reshape(positions, k), parts[width].reshape(positions, k)
    tail_codes, entropy_codes = number(list(parts[-1].reshape(2, 2, positions).swapaxes(0, 1)))
    roots = np.array([1 - j / 240 if j <= 237 else (3 / 240) * 0.55 ** (j - 237) for j in range(256)])
    ids, logprobs, log_tails = [], [], []
    for position in range(positions):
        rising, previous = [], -1
        for gap in gaps[position].tolist():
            previous = previous + 1 + gap
            rising.append(previous)
        assert rising[-1] < contract["vocab_size"]
        order = sorted(range(k), key=lambda entry: (levels[position, entry], rising[entry]))
        code = int(tail_codes[position])
        x = (code - 32768) / 128
        log_tail, log_head = (-np.logaddexp(0, -x), -np.logaddexp(0, x)) if code else (-np.inf, 0.0)
        chosen = roots[[int(levels[position, entry]) for entry in order]]
        ids.append([rising[entry] for entry in order])
        logprobs.append(2 * np.log(chosen) + log_head - np.log((chosen**2).sum()))
        log_tails.append(log_tail)
    return {
        "ids_NK": np.array(ids, np.int32),
        "logprobs_NK": np.array(logprobs).astype(np.float32),
        "log_tail_N": np.array(log_tails).astype(np.float32),
        "entropy_N": (entropy_codes / 1024).astype(np.float32),
    }


def decode_attention(cell: bytes, contract: dict[str, Any], positions: int, prompt: int) -> dict[str, np.ndarray]:
    """Section 6, row by row."""
    layers, top_m = len(contract["attention"]["layers"]), contract["attention"]["top_m"]
    kept, width, rows = min(top_m, prompt - 1), planes(prompt - 1), layers * positions
    parts = streams(cell, [rows * kept] * (width + 1) + [6 * rows])
    gaps, codes = number(parts[:width]).reshape(rows, kept), parts[width].reshape(rows, kept)
    sink, mass, entropy = (number(list(pair)) for pair in parts[-1].reshape(3, 2, rows))
    keys, weights = np.full((rows, top_m), -1, np.int32), np.zeros((rows, top_m), np.float32)
    for row in range(rows):
        rising = (np.cumsum(gaps[row] + 1)).tolist()
        assert not rising or rising[-1] < prompt
        order = sorted(range(kept), key=lambda entry: (-codes[row, entry], rising[entry]))
        shares = (codes[row, order] / 63) ** 2
        divisor = (shares.sum() or 1.0) if kept == prompt - 1 else max(1.0, shares.sum())
        keys[row, :kept] = [rising[entry] for entry in order]
        weights[row, :kept] = shares / divisor * (mass[row] / 65535)
    shape = (layers, positions)
    return {
        "positions_LNM": keys.reshape(*shape, top_m),
        "weights_LNM": weights.reshape(*shape, top_m),
        "sink_LN": (sink / 65535).astype(np.float32).reshape(shape),
        "prompt_LN": (mass / 65535).astype(np.float32).reshape(shape),
        "entropy_LN": (entropy / 1024).astype(np.float32).reshape(shape),
    }
