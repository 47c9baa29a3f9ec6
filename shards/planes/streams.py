"""A cell is a run of streams of numbers, each in a code learnt for its kind; the codec version chooses the coder.

Streams are written and read in one order: how many numbers the next one holds follows from those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.planes.numbers import Numbers

Streams = Iterable[tuple[str, NDArray[np.integer]]]
"""(kind, numbers) in the order of a cell."""
Code = NDArray[np.uint16]
"""What tables hold of a kind: a number for each of its 256 symbols, 0 where the symbol has no word."""


class StreamReader(Protocol):
    """Reads a cell stream by stream."""

    def take(self, kind: str, count: int) -> Numbers:
        """The next stream, which holds `count` numbers below 2^24. Raises Corrupt."""

    def take_all(self, kinds: Sequence[str], counts: Sequence[int]) -> Numbers:
        """The numbers of the next streams, one after the other. Raises Corrupt."""

    def end(self) -> None:
        """Raises Corrupt where anything is left."""


class StreamCoder(Protocol):
    """Packs and reads cells. Threads may share it."""

    code_planes: ClassVar[int]
    """Bytes that a number of a code takes in the tables."""

    def __init__(self, codes: Mapping[str, Code]) -> None:
        """A code for each kind that has one."""

    @staticmethod
    def learn(counts: NDArray[np.integer]) -> Code | None:
        """The code for symbols with these frequencies; None where none is worth it."""

    @staticmethod
    def is_code(code: Code) -> bool: ...

    def pack(self, streams: Streams) -> bytes:
        """One cell."""

    def reader(self, cell: bytes | memoryview) -> StreamReader: ...


def varint(value: int) -> bytes:
    """7 bits a byte, low ones first, the top bit set on all but the last."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
