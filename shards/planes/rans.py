"""Range asymmetric numeral systems (Duda, 1311.2540): eight states in turn, compiled.

- All streams of a cell share the states, so that a stream costs its entropy and nothing else, and a cell 32 bytes at
  most.
- Side bytes are stored as they are, from the end of the cell backwards; words lie in front of them.
- A symbol's share of its code is a frequency out of 4096: to decode one is a look-up, a multiplication and a shift.
- A number whose symbol has no frequency takes three side bytes, so that any number can be written in any code.
- Whole numbers only: the same bytes on every machine. Words beyond the end read as 0, which `end` finds.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.errors import Corrupt
from shards.planes.numbers import ALONE, WIDE, WIDE_FROM, Numbers

Code = NDArray[np.uint16]
"""The frequencies [C, 256] of the symbols of a kind of stream in each of its contexts; all 0 where none were learnt."""
Rows = NDArray[np.uint16]
"""Which row of a coder's frequencies each number has."""
Contexts = NDArray[np.uint16]
Words = NDArray[np.uint16]
Bytes = NDArray[np.uint8]
Shares = NDArray[np.uint32]
"""By row and symbol: frequency << 16 | sum of the frequencies of lower symbols."""
Slots = NDArray[np.uint32]
"""By row and value, what a state that has this value decodes: symbol | frequency - 1 << 8 | value - its first << 20."""
Index = int | np.integer
States = NDArray[np.uint64]
Places = NDArray[np.uint64]
"""Whose turn it is, the next word and how many side bytes were taken."""
Source = tuple[Words, Bytes, States, Places, Slots]
"""Words, side bytes, states, places and slots."""

BITS = 12
TOTAL = 1 << BITS
LEAST_STATE = 1 << 16
"""States lie from here to 2^32 between symbols; a cell is begun with this one."""
STATES = 8
_HEADER = 4 * STATES
INVERSES = ((1 << 44) - 1) // np.maximum(np.arange(TOTAL + 1, dtype=np.uint64), 1)
"""Of frequencies f: floor(x / f) is (x + 1) times it >> 44 for all x < 2^20 f."""


def learn_frequencies(counts: NDArray[np.integer]) -> Code:
    """The frequencies [256] that take the fewest bits for symbols so often, at least 1 where a count is not 0.

    They sum to TOTAL; that of WIDE is not 0.
    """
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


def are_frequencies(code: Code) -> bool:
    """Whether each context of a kind has a code or none."""
    there = code.any(axis=1)
    return bool(((code.sum(axis=1, dtype=np.int64) == TOTAL) & (code[:, WIDE] > 0) | ~there).all())


class Stream(NamedTuple):
    """Numbers of one kind in the order of a cell."""

    kind: str
    numbers: NDArray[np.integer]
    contexts: Contexts | int = 0
    """Of each number, or of all."""


class Coder:
    """Packs and reads cells with the codes of some kinds. Threads may share it."""

    def __init__(self, codes: Mapping[str, Code]) -> None:
        frequencies = np.concatenate(list(codes.values())).astype(np.uint32)
        frequencies[~frequencies.any(axis=1)] = TOTAL // 256
        ends = itertools.accumulate((len(code) for code in codes.values()), initial=0)
        self._rows = dict(zip(codes, ends, strict=False))
        firsts = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        self._shares: Shares = (frequencies << 16 | firsts).astype(np.uint32)
        self._slots = _slots(frequencies, firsts)

    def row(self, kind: str) -> int:
        """The row of a kind's first context; those of the others follow."""
        return self._rows[kind]

    def pack(self, streams: Iterable[Stream]) -> bytes:
        """One cell."""
        given = list(streams)
        numbers = np.concatenate([stream.numbers.ravel() for stream in given]).astype(np.int32, copy=False)
        rows = np.empty(len(numbers), np.uint16)
        at = 0
        for kind, part, contexts in given:
            np.add(contexts, np.uint16(self._rows[kind]), out=rows[at : at + part.size], dtype=np.uint16)
            at += part.size
        assert numbers.min(initial=0) >= 0, "indices of the loop are not checked"
        words, sides = np.empty(len(numbers) + 2 * STATES, "<u2"), np.empty(3 * len(numbers), np.uint8)
        word, side = _encode(numbers, rows, self._shares, INVERSES, words, sides)
        return words[word:].tobytes() + sides[:side].tobytes()

    def reader(self, cell: bytes | memoryview) -> Reader:
        """Raises Corrupt."""
        return Reader(self, self._slots, cell)


def _slots(frequencies: Shares, firsts: Shares) -> Slots:
    symbols = np.tile(np.arange(256, dtype=np.uint32), len(frequencies)).repeat(frequencies.ravel())
    shares = (frequencies - 1 << 8).ravel().repeat(frequencies.ravel())
    within = np.tile(np.arange(TOTAL, dtype=np.uint32), len(firsts)) - firsts.ravel().repeat(frequencies.ravel())
    slots: Slots = (symbols | shares | within << 20).astype(np.uint32, copy=False)
    return slots.reshape(-1, TOTAL)


class Reader:
    """Reads a cell stream by stream."""

    def __init__(self, coder: Coder, slots: Slots, cell: bytes | memoryview) -> None:
        if len(cell) < _HEADER:
            raise Corrupt("a payload has no room for its states")
        self._coder = coder
        self._bytes = np.frombuffer(cell, np.uint8)
        self._states: States = np.array(struct.unpack_from(f"<{STATES}I", cell), np.uint64)
        self._places: Places = np.zeros(3, np.uint64)
        if min(self._states.tolist()) < LEAST_STATE:
            raise Corrupt("a payload begins with a state that no writer leaves")
        count = (len(cell) - _HEADER) // 2
        words = np.zeros(count + 1, np.uint16)
        words[:count] = np.frombuffer(cell, "<u2", count, _HEADER)
        self.source: Source = (words, self._bytes, self._states, self._places, slots)
        """What loops read numbers from."""

    def row(self, kind: str) -> int:
        return self._coder.row(kind)

    def rows(self, kinds: Iterable[str]) -> Rows:
        return np.array([self._coder.row(kind) for kind in kinds], np.uint16)

    def take(self, kind: str, count: int, contexts: Contexts | int = 0) -> Numbers:
        """The next stream, which holds `count` numbers below 2^24."""
        rows, numbers = np.full(count, self.row(kind), np.uint16), np.empty(count, np.int32)
        rows += np.uint16(contexts)
        decode(self.source, rows, numbers)
        return numbers

    def end(self) -> None:
        """Raises Corrupt where anything is left."""
        _, words, sides = self._places.tolist()
        if _HEADER + 2 * words + sides != len(self._bytes) or self._states.tolist() != [LEAST_STATE] * STATES:
            raise Corrupt("a payload's streams do not fill it")


@compiled
def decode(source: Source, rows: Rows, numbers: Numbers) -> None:
    """Fill `numbers` in the codes of `rows`, and move states and places on.

    Any bytes are safe: a value has 12 bits, the index of a word is cut at the last, that of a side byte at the first.
    Symbols first, side bytes then: which symbols have one cannot be foreseen, and states need not wait to find out.
    Indices are unsigned: of a signed one it is asked each time whether it counts from the end.
    """
    words, sides, states, places, slots = source
    turn, word, side = places[0], places[1], places[2]
    last_word, last_side = np.uint64(len(words) - 1), np.uint64(len(sides) - 1)
    for index in range(np.uint64(len(rows))):
        x = states[turn & np.uint64(7)]
        slot = np.uint64(slots[rows[index], x & np.uint64(4095)])
        numbers[index] = slot & np.uint64(255)
        x = ((slot >> np.uint64(8) & np.uint64(4095)) + np.uint64(1)) * (x >> np.uint64(12)) + (slot >> np.uint64(20))
        short = np.uint64(x < np.uint64(65536))
        next_word = np.uint64(words[min(word, last_word)])
        states[turn & np.uint64(7)] = x << (short << np.uint64(4)) | next_word & np.uint64(0) - short
        word += short
        turn += np.uint64(1)
    for index in range(np.uint64(len(rows))):
        symbol = numbers[index]
        if symbol == 255:
            number = np.uint64(0)
            for place in range(3):
                number += np.uint64(sides[max(last_side, side) - side]) << np.uint64(8 * place)
                side += np.uint64(1)
            numbers[index] = number
        elif symbol >= 192:
            numbers[index] = 192 + (symbol - 192 << 8) + np.int32(sides[max(last_side, side) - side])
            side += np.uint64(1)
    places[0], places[1], places[2] = turn & np.uint64(7), word, side


@compiled
def _encode(
    numbers: Numbers, rows: Rows, shares: Shares, inverses: NDArray[np.uint64], words: Words, sides: Bytes
) -> tuple[Index, Index]:
    """Write words at the end of `words` and side bytes at the beginning of `sides`: the last number goes first.

    Returns the first word and the number of side bytes.
    """
    state = np.full(8, 65536, np.uint64)
    word, side, count = np.uint64(len(words)), np.uint64(0), np.uint64(len(numbers))
    for before in range(count):
        index = count - np.uint64(1) - before
        number, row = np.uint64(numbers[index]), rows[index]
        symbol = number
        if number >= 192:
            symbol = np.uint64(255) if number >= 16320 else np.uint64(192) + (number - np.uint64(192) >> np.uint64(8))
        share = shares[row, symbol]
        if symbol == 255 or share < 65536:
            share = shares[row, np.uint64(255)]
            for place in range(2, -1, -1):
                sides[side] = number >> np.uint64(8 * place) & np.uint64(255)
                side += np.uint64(1)
        elif number >= 192:
            sides[side] = number - np.uint64(192) & np.uint64(255)
            side += np.uint64(1)
        x, frequency = state[index & np.uint64(7)], np.uint64(share >> np.uint32(16))
        long = np.uint64(x >= frequency << np.uint64(20))
        words[word - np.uint64(1)] = x & np.uint64(65535)
        word -= long
        x >>= long << np.uint64(4)
        quotient = (x + np.uint64(1)) * inverses[frequency] >> np.uint64(44)
        rest = x - quotient * frequency
        state[index & np.uint64(7)] = (quotient << np.uint64(12)) + rest + np.uint64(share & np.uint32(65535))
    for turn in range(7, -1, -1):
        word -= np.uint64(2)
        words[word], words[word + np.uint64(1)] = state[turn] & np.uint64(65535), state[turn] >> np.uint64(16)
    return word, side


assert (ALONE, WIDE_FROM, WIDE, STATES) == (192, 16_320, 255, 8), "as the loops have them"
