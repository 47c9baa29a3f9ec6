"""The coder of "planes/3": range asymmetric numeral systems (Duda, 1311.2540), four states in turn, compiled.

- All streams of a cell share the states, so that a stream costs its entropy and nothing else, and a cell about 8 bytes.
- Side bytes are stored as they are, from the end of the cell backwards; words lie in front of them.
- A symbol's share of its code is a frequency out of 4096: to decode one is a look-up, a multiplication and a shift.
- A number whose symbol has no frequency takes three side bytes, so that any number can be written in any code.
- Whole numbers only: the same bytes on every machine. Words beyond the end read as 0, which `end` finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.errors import Corrupt
from shards.planes.numbers import ALONE, WIDE, WIDE_FROM, Numbers
from shards.planes.streams import Code, Streams

Slots = NDArray[np.uint32]
State = NDArray[np.uint64]

BITS = 12
TOTAL = 1 << BITS
LEAST_STATE = 1 << 16
"""States lie from here to 2^32 between symbols; a cell is begun with this one."""
STATES = 4
_HEADER = 4 * STATES

_EVEN: Code = np.full(256, TOTAL // 256, np.uint16)
"""Of kinds that have no code."""


class RansCoder:
    """A code is the frequencies of its symbols, TOTAL in all, that of symbol 255 not 0. Threads may share a coder."""

    code_planes: ClassVar[int] = 2

    def __init__(self, codes: Mapping[str, Code]) -> None:
        self._rows = {kind: row for row, kind in enumerate(codes, 1)}
        frequencies = np.stack([_EVEN, *codes.values()]).astype(np.uint32)
        firsts = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        self._ranges: Slots = (frequencies << 16 | firsts).astype(np.uint32)
        self._slots = np.stack([_slots(*pair) for pair in zip(frequencies, firsts, strict=True)])

    @staticmethod
    def learn(counts: NDArray[np.integer]) -> Code | None:
        """The frequencies that take the fewest bits for symbols so often, at least 1 where a count is not 0."""
        counts = counts.astype(np.int64)
        counts[WIDE] = max(1, counts[WIDE])
        used = counts > 0
        code = np.where(used, np.maximum(counts * TOTAL // counts.sum(), 1), 0)
        while True:
            share = 1 / np.maximum(code, 1)
            gains = np.where(used, counts * np.log1p(share), -np.inf)
            losses = np.where(code > 1, -counts * np.log1p(-np.minimum(share, 0.5)), np.inf)
            more, less, left = gains.argmax(), losses.argmin(), TOTAL - int(code.sum())
            # Where both are the same number, rounding must not swap them for ever.
            if left == 0 and gains[more] <= (1 + 1e-9) * losses[less]:
                return code.astype(np.uint16)
            code[more] += left >= 0
            code[less] -= left <= 0

    @staticmethod
    def is_code(code: Code) -> bool:
        return int(code.sum(dtype=np.int64)) == TOTAL and code[WIDE] > 0

    def pack(self, streams: Streams) -> bytes:
        parts = [(self._rows.get(kind, 0), numbers.ravel()) for kind, numbers in streams]
        rows = np.array([row for row, _ in parts])
        counts = np.array([len(numbers) for _, numbers in parts])
        numbers = np.concatenate([numbers for _, numbers in parts]).astype(np.int32, copy=False)
        assert numbers.min(initial=0) >= 0, "indices of the loop are not checked"
        words, sides = np.empty(len(numbers) + 2 * STATES, "<u2"), np.empty(3 * len(numbers), np.uint8)
        word, side = _encode(numbers, counts, rows, self._ranges, words, sides)
        return words[word:].tobytes() + sides[:side].tobytes()

    def reader(self, cell: bytes | memoryview) -> RansReader:
        return RansReader(self, cell)

    def tables(self, kinds: Sequence[str]) -> tuple[Slots, NDArray[np.int64]]:
        """The slots of all codes, and which of them these kinds have.

        A slot tells for a value of a state's low bits: symbol, frequency - 1, distance from the symbol's first value.
        """
        return self._slots, np.array([self._rows.get(kind, 0) for kind in kinds])


class RansReader:
    def __init__(self, coder: RansCoder, cell: bytes | memoryview) -> None:
        """Raises Corrupt."""
        if len(cell) < _HEADER:
            raise Corrupt("a payload has no room for its states")
        self._coder = coder
        self._bytes = np.frombuffer(cell, np.uint8)
        self._state: State = np.zeros(STATES + 2, np.uint64)
        """The states, the next word and how many side bytes were taken."""
        self._state[:STATES] = np.frombuffer(cell, "<u4", STATES)
        if self._state[:STATES].min() < LEAST_STATE:
            raise Corrupt("a payload begins with a state that no writer leaves")
        count = (len(cell) - _HEADER) // 2
        self._words = np.zeros(count + 1, np.uint16)
        self._words[:count] = np.frombuffer(cell, "<u2", count, _HEADER)

    def take(self, kind: str, count: int) -> Numbers:
        return self.take_all((kind,), (count,))

    def take_all(self, kinds: Sequence[str], counts: Sequence[int]) -> Numbers:
        numbers = np.empty(sum(counts), np.int32)
        _decode(self._words, self._bytes, self._state, *self._coder.tables(kinds), np.array(counts), numbers)
        return numbers

    def end(self) -> None:
        *states, words, sides = self._state.tolist()
        if _HEADER + 2 * words + sides != len(self._bytes) or states != [LEAST_STATE] * STATES:
            raise Corrupt("a payload's streams do not fill it")


def _slots(frequencies: Slots, firsts: Slots) -> Slots:
    symbols = np.repeat(np.arange(256, dtype=np.uint32), frequencies)
    distance = np.arange(TOTAL, dtype=np.uint32) - firsts[symbols]
    slots: Slots = (symbols << 24 | (frequencies[symbols] - 1) << BITS | distance).astype(np.uint32)
    return slots


@compiled
def _decode(
    words: NDArray[np.uint16],
    sides: NDArray[np.uint8],
    state: State,
    slots: Slots,
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    numbers: Numbers,
) -> None:
    """Fill `numbers` with streams of `counts` in the codes of `rows`, and move the state on.

    Any bytes are safe: a slot's index has 12 bits, that of a word is cut at the last, that of a side byte at the first.
    """
    a, b, c, d, word, side = state
    low, last = np.uint64(4095), np.uint64(len(words) - 1)
    index = 0
    for stream in range(len(counts)):
        row = slots[rows[stream]]
        for _ in range(counts[stream]):
            slot = np.uint64(row[a & low])
            x = ((slot >> np.uint64(12) & low) + np.uint64(1)) * (a >> np.uint64(12)) + (slot & low)
            short = np.uint64(x < np.uint64(65536))
            x = x << (short << np.uint64(4)) | np.uint64(words[min(word, last)]) & (np.uint64(0) - short)
            word += short
            a, b, c, d = b, c, d, x
            number = np.int32(slot >> np.uint64(24))
            if number >= 192:
                wide = number == 255
                number = (number - np.int32(192) << np.int32(8)) + np.int32(192)
                if wide:
                    number = np.int32(0)
                for place in range(3 if wide else 1):
                    side += np.uint64(1)
                    at = np.int64(len(sides)) - np.int64(side)
                    number += np.int32(sides[at if at > 0 else 0]) << np.int32(8 * place)
            numbers[index] = number
            index += 1
    state[0], state[1], state[2], state[3], state[4], state[5] = a, b, c, d, word, side


@compiled
def _encode(
    numbers: Numbers,
    counts: NDArray[np.int64],
    rows: NDArray[np.int64],
    ranges: Slots,
    words: NDArray[np.uint16],
    sides: NDArray[np.uint8],
) -> tuple[int, int]:
    """Write words at the end of `words` and side bytes at the beginning of `sides`: the last number goes first.

    Returns the first word and the number of side bytes.
    """
    a = b = c = d = np.uint64(65536)
    word, side, index = len(words), 0, len(numbers)
    for stream in range(len(counts) - 1, -1, -1):
        row = ranges[rows[stream]]
        for _ in range(counts[stream]):
            index -= 1
            number = numbers[index]
            symbol = number
            if number >= 192:
                symbol = 255 if number >= 16320 else 192 + (number - 192 >> 8)
            if symbol == 255 or row[symbol] < 65536:
                symbol = 255
                for place in range(2, -1, -1):
                    sides[side] = number >> 8 * place & 255
                    side += 1
            elif number >= 192:
                sides[side] = number - 192 & 255
                side += 1
            frequency, first = np.uint64(row[symbol] >> np.uint32(16)), np.uint64(row[symbol] & np.uint32(65535))
            if d >= frequency << np.uint64(20):
                word -= 1
                words[word] = d & np.uint64(65535)
                d >>= np.uint64(16)
            quotient = np.uint64(np.uint32(d) // np.uint32(frequency))
            x = (quotient << np.uint64(12)) + (d - quotient * frequency) + first
            a, b, c, d = x, a, b, c
    for state in (d, c, b, a):
        word -= 2
        words[word], words[word + 1] = state & np.uint64(65535), state >> np.uint64(16)
    return word, side


assert (ALONE, WIDE_FROM, WIDE) == (192, 16_320, 255), "as the loops have them"
