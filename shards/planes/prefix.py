"""The coder of "planes/2": each stream is the bits of a Huffman code.

- All streams of a cell are coded at once: words of neighbouring symbols are merged until they fill 64 bits.
- zstandard decodes them, and is never asked for more symbols than belong there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from shards.errors import Corrupt
from shards.planes.huffman import PIECE, SINGLE, code_lengths, code_words, dictionary_of, frame_around, is_code
from shards.planes.numbers import Numbers, from_symbols, to_symbols
from shards.planes.streams import Code, Streams, varint

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

_PLAIN = 0
"""Stands where the size of a bitstream would: the symbols follow as they are."""
_OVERHEAD = 8
"""Bytes that a coded piece must save to be worth it."""
_LONGEST_VARINT = 5
_ONE = np.ones(1, np.uint64)


class PrefixCoder:
    """A code is the lengths of its words. Threads may share a coder."""

    code_planes: ClassVar[int] = 1

    def __init__(self, codes: Mapping[str, Code]) -> None:
        self._lengths = {kind: lengths.astype(np.uint64) for kind, lengths in codes.items()}
        self._words = {kind: code_words(lengths) for kind, lengths in codes.items()}
        self._dictionaries = {kind: dictionary_of(lengths) for kind, lengths in codes.items()}
        self._local = threading.local()

    @staticmethod
    def learn(counts: NDArray[np.integer]) -> Code | None:
        lengths = code_lengths(counts).astype(np.uint16)
        return lengths if is_code(lengths) else None

    @staticmethod
    def is_code(code: Code) -> bool:
        return is_code(code)

    def pack(self, streams: Streams) -> bytes:
        parts: list[bytes | list[int]] = []
        words: list[Words] = []
        lengths: list[Words] = []
        for kind, numbers in streams:
            symbols, side = to_symbols(numbers)
            for first in range(0, len(symbols), PIECE):
                piece = symbols[first : first + PIECE]
                segments = self._segments(kind, piece)
                if segments is None:
                    parts += varint(_PLAIN), piece.tobytes()
                    continue
                parts.append([_append(words, lengths, *segment) for segment in segments])
            parts.append(side.tobytes())
        return _assembled(parts, _packed(words, lengths))

    def reader(self, cell: bytes | memoryview) -> PrefixReader:
        return PrefixReader(self, cell)

    def expand(self, kind: str, sizes: Sequence[int], bitstreams: memoryview, count: int) -> bytes:
        """The `count` symbols of a piece. Raises Corrupt where it holds anything else."""
        if kind not in self._dictionaries:
            raise Corrupt(f"a payload codes {kind!r}, for which its tables have no code")
        try:
            symbols: bytes = self._decompressor(kind).decompress(
                frame_around(sizes, bitstreams, count), allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise Corrupt(f"a payload cannot be expanded: {error}") from error
        assert len(symbols) == count, "zstandard gives what a frame states, or fails"
        return symbols

    def _segments(self, kind: str, symbols: Bytes) -> list[tuple[Words, Words]] | None:
        """Words and lengths of each bitstream of a piece; None where it is no shorter than the symbols."""
        if kind not in self._lengths:
            return None
        lengths = self._lengths[kind][symbols]
        bits = int(lengths.sum())
        if not lengths.all() or bits // 8 + _OVERHEAD >= len(symbols):
            return None
        words = self._words[kind][symbols]
        span = len(symbols) if len(symbols) <= SINGLE else -(-len(symbols) // 4)
        return [(words[at : at + span], lengths[at : at + span]) for at in range(0, len(symbols), span)]

    def _decompressor(self, kind: str) -> zstandard.ZstdDecompressor:
        """This thread's own: a decompressor cannot be shared."""
        mine: dict[str, zstandard.ZstdDecompressor] = self._local.__dict__
        if kind not in mine:
            mine[kind] = zstandard.ZstdDecompressor(
                dict_data=self._dictionaries[kind], format=zstandard.FORMAT_ZSTD1_MAGICLESS
            )
        return mine[kind]


class PrefixReader:
    def __init__(self, coder: PrefixCoder, cell: bytes | memoryview) -> None:
        self._coder = coder
        self._cell = memoryview(cell)
        self._at = 0

    def take(self, kind: str, count: int) -> Numbers:
        """The next stream, which holds `count` numbers. Raises Corrupt."""
        if 0 < count <= PIECE:
            symbols = np.frombuffer(self._piece(kind, count), np.uint8)
        else:
            pieces = [self._piece(kind, min(PIECE, count - first)) for first in range(0, count, PIECE)]
            symbols = np.frombuffer(b"".join(pieces), np.uint8)
        return from_symbols(symbols, lambda count: np.frombuffer(self._bytes(count), np.uint8))

    def take_all(self, kinds: Sequence[str], counts: Sequence[int]) -> Numbers:
        return np.concatenate([self.take(kind, count) for kind, count in zip(kinds, counts, strict=True)])

    def end(self) -> None:
        """Raises Corrupt where anything is left."""
        if self._at != len(self._cell):
            raise Corrupt("a payload's streams do not fill it")

    def _piece(self, kind: str, count: int) -> bytes | memoryview:
        sizes = [self._varint()]
        if sizes[0] == _PLAIN:
            return self._bytes(count)
        if count > SINGLE:
            sizes += [self._varint() for _ in range(3)]
        if sum(sizes) >= count:
            raise Corrupt("a payload states bitstreams no shorter than their symbols")
        return self._coder.expand(kind, sizes, self._bytes(sum(sizes)), count)

    def _bytes(self, count: int) -> memoryview:
        found = self._cell[self._at : self._at + count]
        if len(found) < count:
            raise Corrupt("a payload ends within a stream")
        self._at += count
        return found

    def _varint(self) -> int:
        value = shift = 0
        for byte in self._cell[self._at : self._at + _LONGEST_VARINT]:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                self._at += shift // 7
                return value
        raise Corrupt("a payload states a size beyond all bounds, or ends within it")


def _append(all_words: list[Words], all_lengths: list[Words], words: Words, lengths: Words) -> int:
    """Add one bitstream: a 1 that fills up its first byte, then the words. Returns its bytes."""
    bits = int(lengths.sum())
    marker = 8 - bits % 8
    all_words += _ONE, words
    all_lengths += np.array([marker], np.uint64), lengths
    return (bits + marker) // 8


def _packed(words: list[Words], lengths: list[Words]) -> bytes:
    """All words one after the other, high bits first."""
    if not words:
        return b""
    word, length = np.concatenate(words), np.concatenate(lengths)
    for _ in range(2):  # four words are at most 44 bits
        if len(word) % 2:
            word, length = np.append(word, np.uint64(0)), np.append(length, np.uint64(0))
        word = word[::2] << length[1::2] | word[1::2]
        length = length[::2] + length[1::2]
    start = np.cumsum(length) - length
    block, offset = start >> np.uint64(6), start & np.uint64(63)
    word <<= np.uint64(64) - length
    firsts = np.flatnonzero(np.diff(block, prepend=np.uint64(1 << 63)))
    packed = np.append(np.bitwise_or.reduceat(word >> offset, firsts), np.uint64(0))
    packed[1:] |= np.bitwise_or.reduceat(word << (np.uint64(64) - offset), firsts)
    return packed.byteswap().tobytes()


def _assembled(parts: list[bytes | list[int]], packed: bytes) -> bytes:
    """The parts in order, where sizes stand for that many bytes of each bitstream, given backwards."""
    found: list[bytes] = []
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            found.append(part)
            continue
        found += map(varint, part)
        for size in part:
            found.append(packed[at : at + size][::-1])
            at += size
    return b"".join(found)
