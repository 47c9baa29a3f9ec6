"""Byte planes: arrays of small numbers as runs of bytes that compress well, each in a zstandard frame of stated size.

- A number below 2^(8 w) takes w planes: all low bytes, then all next bytes.
- `unpack` knows the size of every plane before it reads one: a frame that states another size is never expanded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from shards.errors import Corrupt

Bytes = NDArray[np.uint8]

LEVEL = 9


def planes_for(largest: int) -> int:
    """How many byte planes hold every number from 0 to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


def split(numbers: NDArray[np.integer], planes: int) -> list[Bytes]:
    """The low byte of each number, then the next, ..."""
    return [(numbers >> (8 * plane)).astype(np.uint8) for plane in range(planes)]


def join(planes: Sequence[Bytes]) -> NDArray[np.int32]:
    """The inverse of `split`; at most three planes, so that the result is never negative."""
    numbers = planes[0].astype(np.int32)
    for index, plane in enumerate(planes[1:], start=1):
        numbers |= plane.astype(np.int32) << (8 * index)
    return numbers


def pack(streams: Sequence[bytes]) -> bytes:
    """Compress streams into one cell: the size of each frame as 4 little-endian bytes, then the frames."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    frames = [compressor.compress(stream) for stream in streams]
    return struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)


def unpack(cell: bytes | memoryview, sizes: Sequence[int]) -> list[Bytes]:
    """Expand a cell into streams of exactly `sizes` bytes. Raises Corrupt where it holds anything else."""
    header = 4 * len(sizes)
    if len(cell) < header:
        raise Corrupt("a payload ends within its header")
    frame_sizes = struct.unpack_from(f"<{len(sizes)}I", cell)
    if header + sum(frame_sizes) != len(cell):
        raise Corrupt("a payload's frames do not fill it")
    decompressor = zstandard.ZstdDecompressor()
    streams, start = [], header
    for size, frame_size in zip(sizes, frame_sizes, strict=True):
        frame = cell[start : start + frame_size]
        start += frame_size
        try:
            if zstandard.frame_content_size(frame) != size:
                raise Corrupt(f"a payload's frame does not state the {size} bytes that belong there")
            stream = decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Corrupt(f"a payload cannot be expanded: {error}") from error
        if len(stream) != size:
            raise Corrupt(f"a payload's frame holds {len(stream)} bytes where {size} belong")
        streams.append(np.frombuffer(stream, np.uint8))
    return streams
