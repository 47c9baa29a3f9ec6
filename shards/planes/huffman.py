"""Huffman codes that are learnt once and decoded by zstandard.

A few hundred symbols cannot pay for a code of their own, nor for a frame around them. So a code is learnt for a kind of
stream and kept as its lengths; a stream is its bits and nothing else. To decode one, the frame that zstandard wants
is put around it, with a dictionary that holds nothing but the code (RFC 8878, 3.1.1.3.1 and 5).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

MAX_LENGTH = 11
"""Longest code word that zstandard decodes."""
SINGLE = 1_023
"""Symbols that one bitstream may hold; more are divided among four."""
PIECE = 1 << 16
"""Symbols of one frame at most: zstandard's blocks hold 2^17."""

_MAGIC, _ID = 0xEC30A437, 1
_SEQUENCES = bytes.fromhex(
    "20841042444444444444444492244907d10821841042082184104208218410420811111111111111114992241de1"
    "09218410428888888888888888489224e9"
)
"""Even tables for offsets, match lengths and literal lengths: a dictionary must have them, our frames use none."""
_OFFSETS_AND_CONTENT = struct.pack("<3I", 1, 4, 8) + bytes(8)
_SAMPLE = 1 << 14
_FRAME = bytes([0b1000_0000, (17 - 10) << 3])
"""Frame header: four bytes of content size follow; a window of 2^17."""
_TREELESS, _LAST_COMPRESSED = 3, 1 | 2 << 1


def code_lengths(counts: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Lengths of the best code with words of 1 to 11 bits, by package-merge; 0 where a count is 0.

    Raises ValueError for fewer than two symbols.
    """
    symbols = np.flatnonzero(counts)
    if len(symbols) < 2:
        raise ValueError("a code needs two symbols")
    leaves = sorted((int(counts[symbol]), (int(symbol),)) for symbol in symbols)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(MAX_LENGTH):
        merged = sorted([*leaves, *packages])
        pairs = zip(merged[::2], merged[1::2], strict=False)
        packages = [(low[0] + high[0], low[1] + high[1]) for low, high in pairs]
    chosen = [symbol for _, members in packages[: len(leaves) - 1] for symbol in members]
    return np.bincount(chosen, minlength=len(counts)).astype(np.uint8)


def is_code(lengths: NDArray[np.integer]) -> bool:
    """Whether these are lengths of at least two words, none unused, that take 7.5 bits or less where they fit.

    zstandard will not write down a code that saves less.
    """
    used = lengths[lengths > 0].astype(np.int64)
    if len(used) < 2 or used.max() > MAX_LENGTH:
        return False
    shares = 1 << (MAX_LENGTH - used)
    return int(shares.sum()) == 1 << MAX_LENGTH and 2 * int((used * shares).sum()) <= 15 << MAX_LENGTH


def code_words(lengths: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The word of each symbol: the longest come first, equally long ones by symbol, in counting order."""
    words = np.zeros(len(lengths), np.uint64)
    word, length = 0, MAX_LENGTH
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (-int(lengths[symbol]), symbol)):
        word >>= length - int(lengths[symbol])
        length = int(lengths[symbol])
        words[symbol] = word
        word += 1
    return words


def dictionary_of(lengths: NDArray[np.integer]) -> zstandard.ZstdCompressionDict:
    """A zstandard dictionary that holds a code."""
    content = struct.pack("<2I", _MAGIC, _ID) + _description(lengths) + _SEQUENCES + _OFFSETS_AND_CONTENT
    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT)


def frame_around(sizes: Sequence[int], bitstreams: bytes | memoryview, count: int) -> bytes:
    """The frame, without magic number, of `count` symbols: one block of literals in the dictionary's code.

    `sizes` are those of the bitstreams: one for at most SINGLE symbols, else four; together less than `count`.
    """
    if len(sizes) == 1:
        jumps, size_format, bits = b"", 0, 10
    else:
        jumps, size_format, bits = struct.pack("<3H", *sizes[:3]), 3, 18
    header = _TREELESS | size_format << 2 | count << 4 | (len(jumps) + len(bitstreams)) << (4 + bits)
    literals = header.to_bytes((4 + 2 * bits) // 8, "little")
    block = _LAST_COMPRESSED | (len(literals) + len(jumps) + len(bitstreams) + 1) << 3
    return b"".join((_FRAME, struct.pack("<I", count), block.to_bytes(3, "little"), literals, jumps, bitstreams, b"\0"))


def _description(lengths: NDArray[np.integer]) -> bytes:
    """The tree description (RFC 8878, 4.2.1) of a code.

    zstandard writes it: each symbol as often as its length says, in random order, has no better code than this one.
    """
    repeats = np.where(lengths > 0, _SAMPLE >> lengths.astype(np.int64), 0)
    symbols = np.repeat(np.arange(256, dtype=np.uint8), repeats)
    frame = zstandard.ZstdCompressor(compression_params=_literals_only()).compress(
        np.random.default_rng(0).permutation(symbols).tobytes()
    )
    block = zstandard.frame_header_size(frame)
    literals = block + 3
    assert (frame[block] >> 1 & 3, frame[literals] & 3) == (2, 2), "a code that saves something compresses"
    tree = literals + (3, 3, 4, 5)[frame[literals] >> 2 & 3]
    size = frame[tree] if frame[tree] < 128 else (frame[tree] - 126) // 2
    return frame[tree : tree + 1 + size]


def _literals_only() -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, min_match=7, target_length=0
    )
