"""Which rows are train and which validation: a function of text and seed, never of the order in the file.

Rows are ranked by a keyed hash of their prompt, so adding rows to a file does not reshuffle the others, and rows that
share a prompt stand together and are never divided between the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Indices into the ranked rows, each rising."""

    train: Int64
    dev: Int64


def rank(sample_keys_S: UInt64, prompt_keys_S: UInt64, *, seed: int) -> Int64:
    """Indices of the distinct rows by keyed hash of the prompt, then by sample key."""
    order: Int64 = np.lexsort((sample_keys_S, _mix(prompt_keys_S ^ _mix(np.array([seed], dtype=np.uint64)))))
    if not order.size:
        return order
    ordered = sample_keys_S[order]
    first: Int64 = order[np.concatenate(([True], ordered[1:] != ordered[:-1]))]
    return first


def divide(prompt_keys_N: UInt64, *, train_size: int, val_size: int) -> Split:
    """Divide N <= train_size + val_size ranked rows, equal prompts side by side, in the ratio of the two sizes.

    Validation takes whole prompts in rank order as long as they fit; where every prompt has more rows than validation
    may hold, it takes a part of the smallest, and the rest of that prompt is left out.
    """
    rows = len(prompt_keys_N)
    assert rows <= train_size + val_size
    if rows == 0:
        return Split(train=np.empty(0, dtype=np.int64), dev=np.empty(0, dtype=np.int64))
    target = max(1, rows * val_size // (train_size + val_size))
    starts = np.flatnonzero(np.concatenate(([True], prompt_keys_N[1:] != prompt_keys_N[:-1])))
    lengths = np.diff(np.concatenate((starts, [rows])))

    dev = np.zeros(rows, dtype=bool)
    taken = 0
    for start, length in zip(starts, lengths, strict=True):
        if taken + length <= target:
            dev[start : start + length] = True
            taken += length
    left_out = np.zeros(rows, dtype=bool)
    if taken == 0:
        smallest = int(np.argmin(lengths))
        start, length = starts[smallest], lengths[smallest]
        dev[start : start + target] = True
        left_out[start + target : start + length] = True
    return Split(train=np.flatnonzero(~dev & ~left_out)[:train_size], dev=np.flatnonzero(dev))


def _mix(keys: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection, so distinct prompts never tie."""
    with np.errstate(over="ignore"):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))
