"""Whole numbers as symbols of one byte, most of them alone, with side bytes for the few that are large.

- 0 to 191 are symbols themselves;
- 192 to 16,319 take one side byte: symbol 192 + (x - 192) // 256, side byte (x - 192) % 256;
- symbol 255 stands for any number below 2^24, in three little-endian side bytes.

The symbols of a stream are what an entropy coder sees; side bytes are close to uniform and stored as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int32]

ALONE, WIDE = 192, 255
WIDE_FROM = ALONE + ((WIDE - ALONE) << 8)
LIMIT = 1 << 24


def to_symbols(numbers: NDArray[np.integer]) -> tuple[Bytes, Bytes]:
    """Symbols and side bytes: first those of one, then those of three, each in the order of their numbers."""
    numbers = numbers.ravel()
    large = np.flatnonzero(numbers >= ALONE)
    symbols = numbers.astype(np.uint8)
    if not large.size:
        return symbols, symbols[:0]
    rest = numbers[large].astype(np.int64) - ALONE
    wide = rest >= WIDE_FROM - ALONE
    symbols[large] = np.where(wide, WIDE, ALONE + (rest >> 8))
    wides = (rest[wide] + ALONE).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    return symbols, np.concatenate([rest[~wide].astype(np.uint8), wides.ravel()])


def from_symbols(symbols: Bytes, take: Callable[[int], Bytes]) -> Numbers:
    """The inverse of `to_symbols`. `take` gives the next so many side bytes."""
    numbers = symbols.astype(np.int32)
    if symbols.max(initial=0) < ALONE:
        return numbers
    large = np.flatnonzero(symbols >= ALONE)
    wide = large[symbols[large] == WIDE]
    short = large if not wide.size else large[symbols[large] < WIDE]
    numbers[short] = ((numbers[short] - ALONE) << 8) + ALONE + take(short.size)
    if wide.size:
        low, middle, high = take(3 * wide.size).reshape(-1, 3).T.astype(np.int32)
        numbers[wide] = low | middle << 8 | high << 16
    return numbers


def zigzag(numbers: NDArray[np.integer]) -> NDArray[np.integer]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    folded: NDArray[np.integer] = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)
    return folded


def unzigzag(numbers: Numbers) -> Numbers:
    """The inverse of `zigzag`."""
    return (numbers >> 1) ^ -(numbers & 1)
