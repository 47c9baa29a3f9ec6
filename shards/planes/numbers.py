"""Whole numbers as symbols of one byte, most of them alone, with side bytes for the few that are large.

- 0 to 191 are symbols themselves;
- 192 to 16,319 take one side byte: symbol 192 + (x - 192) // 256, side byte (x - 192) % 256;
- symbol 255 stands for any number below 2^24, in three little-endian side bytes.

The symbols of a stream are what an entropy coder sees; side bytes are close to uniform and stored as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int32]

ALONE, WIDE = 192, 255
WIDE_FROM = ALONE + ((WIDE - ALONE) << 8)


def to_symbols(numbers: NDArray[np.integer]) -> tuple[NDArray[np.uint8], int]:
    """The symbols, and how many side bytes they take."""
    numbers = numbers.ravel()
    wide, alone = numbers >= WIDE_FROM, numbers < ALONE
    symbols = np.where(wide, WIDE, np.where(alone, numbers, ALONE + (numbers - ALONE >> 8))).astype(np.uint8)
    return symbols, int(3 * np.count_nonzero(wide) + np.count_nonzero(~wide & ~alone))


def zigzag(numbers: NDArray[np.integer]) -> NDArray[np.integer]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    folded: NDArray[np.integer] = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)
    return folded


def unzigzag(numbers: Numbers) -> Numbers:
    """The inverse of `zigzag`."""
    return (numbers >> 1) ^ -(numbers & 1)
