"""What is learnt before a set is written: orders of the vocabulary by class of position, and codes.

The bytes stand in every shard and their SHA-256 in the contract, so that a shard is read with what it was written with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import zstandard
from numpy.typing import NDArray

from shards import byte_planes
from shards.errors import Corrupt
from shards.planes.levels import LEAST_STEPS, MOST_STEPS, Levels, levels_of
from shards.planes.rans import Code, Coder, are_frequencies

Ids = NDArray[np.int32]

MAX_CLASSES = 24
MOST_COST = 1_000
_COST_SCALE = MOST_COST / np.log(1 << 24)
MAX_BYTES = 1 << 26
"""Tables expanded, at most."""
_CODE_PLANES = 2

GAP_CONTEXTS = 20
"""See `id_sets.py`."""
KINDS: Mapping[str, int] = {
    "classes": 1,
    "sizes": 1,
    "least": 1,
    "labels": 1,
    "ids": GAP_CONTEXTS,
    "levels": 6,
    "tail": 1,
    "entropy": 1,
    "drawn-labels": 1,
    "drawn": GAP_CONTEXTS,
    "counts": 1,
    "log-probs": 1,
    "values": 2,
    "slopes": 2,
    "key-counts": 1,
    "key-orders": 1,
    "key-shares": 1,
    "keys": GAP_CONTEXTS,
    "shares": 3,
    "masses": 1,
    "row-entropies": 1,
}
"""The kinds of streams and how many contexts each has, by their order in the bytes."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Learnt tables. Built by `learn_tables`, or from what a shard holds."""

    vocab_size: int
    steps: int
    """How many steps of sqrt(p) there are; see `levels.py`."""
    common: Ids
    """The ids that lead the order of every class, after those of `leading`."""
    leading: tuple[Ids, ...]
    """The ids that lead the order of each class; at least one class."""
    codes: Mapping[str, Code]
    """Of every kind of stream."""

    @cached_property
    def orders_CV(self) -> Ids:
        """[C, V]: each class's permutation of the vocabulary: its leading ids, the common ones, then by rising id."""
        return np.stack([_completed(leading, self.common, self.vocab_size) for leading in self.leading])

    @cached_property
    def ranks_CV(self) -> NDArray[np.uint32]:
        """[C, V]: where each id stands in each order."""
        ranks_CV = np.empty(self.orders_CV.shape, np.uint32)
        np.put_along_axis(ranks_CV, self.orders_CV, np.arange(self.vocab_size, dtype=np.uint32)[None], axis=1)
        return ranks_CV

    @cached_property
    def costs_VW(self) -> NDArray[np.uint64]:
        """[V, 6]: log(1 + rank), about what an id costs in each order, as 16-bit steps, four in a number.

        Classes that do not exist cost most.
        """
        steps_CV = np.rint(_COST_SCALE * np.log1p(self.ranks_CV.astype(np.float64))).astype(np.uint16)
        others = ((0, MAX_CLASSES - len(steps_CV)), (0, 0))
        steps_VC = np.pad(steps_CV, others, constant_values=MOST_COST).T
        return np.ascontiguousarray(steps_VC).view(np.uint64)

    @property
    def levels(self) -> Levels:
        return levels_of(self.steps)

    @cached_property
    def coder(self) -> Coder:
        return Coder(self.codes)

    def to_bytes(self) -> bytes:
        """One zstandard frame; see FORMAT.md."""
        width = byte_planes.planes_for(self.vocab_size - 1)
        parts = [varint(self.steps), varint(len(self.leading))]
        for ids in (self.common, *self.leading):
            parts.append(varint(len(ids)))
            parts += (plane.tobytes() for plane in byte_planes.split(ids, width))
        for kind in KINDS:
            parts += (plane.tobytes() for plane in byte_planes.split(self.codes[kind], _CODE_PLANES))
        return zstandard.ZstdCompressor(level=19).compress(b"".join(parts))

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int) -> Tables:
        """Raises Corrupt. The tables of the last few calls are kept: shards of a set share theirs."""
        return _parsed(data, vocab_size)


def varint(value: int) -> bytes:
    """7 bits a byte, low ones first, the top bit set on all but the last."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def fingerprint(data: bytes) -> str:
    """What a contract's `tables` says of these bytes."""
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=4)
def _parsed(data: bytes, vocab_size: int) -> Tables:
    content = _Content(_expanded(data))
    width = byte_planes.planes_for(vocab_size - 1)
    steps, classes = content.varint(), content.varint()
    if not LEAST_STEPS <= steps <= MOST_STEPS:
        raise Corrupt(f"tables of {steps} steps, {LEAST_STEPS} to {MOST_STEPS} there are")
    if not 1 <= classes <= MAX_CLASSES:
        raise Corrupt(f"tables of {classes} classes, at most {MAX_CLASSES} there are")
    common, *leading = (content.ids(width, vocab_size) for _ in range(1 + classes))
    codes = {kind: content.code(contexts) for kind, contexts in KINDS.items()}
    content.end()
    if not all(map(are_frequencies, codes.values())):
        raise Corrupt("tables hold a code that is none")
    return Tables(
        vocab_size=vocab_size,
        steps=steps,
        common=common,
        leading=tuple(leading),
        codes=codes,
    )


def _expanded(data: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= MAX_BYTES:
            raise Corrupt(f"tables state {size} bytes, at most {MAX_BYTES} may be")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"tables cannot be expanded: {error}") from error


class _Content:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise Corrupt("tables end within a part")
        self._at += count
        return found

    def varint(self) -> int:
        value = shift = 0
        while shift <= 28:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise Corrupt("tables state a size beyond all bounds")

    def ids(self, width: int, vocab_size: int) -> Ids:
        count = self.varint()
        if count > vocab_size:
            raise Corrupt(f"tables list {count} ids of a vocabulary of {vocab_size}")
        ids = byte_planes.join([np.frombuffer(self.take(count), np.uint8) for _ in range(width)])
        if count and (ids.max() >= vocab_size or len(np.unique(ids)) < count):
            raise Corrupt(f"tables list an id twice or one outside a vocabulary of {vocab_size}")
        return ids

    def code(self, contexts: int) -> Code:
        planes = [np.frombuffer(self.take(256 * contexts), np.uint8) for _ in range(_CODE_PLANES)]
        return byte_planes.join(planes).astype(np.uint16).reshape(contexts, 256)

    def end(self) -> None:
        if self._at != len(self._data):
            raise Corrupt("tables hold more than belongs there")


def _completed(leading: Ids, common: Ids, vocab_size: int) -> Ids:
    left = np.ones(vocab_size, bool)
    left[leading] = False
    second = common[left[common]]
    left[second] = False
    return np.concatenate([leading, second, np.flatnonzero(left).astype(np.int32)])


def plain_tables(vocab_size: int, steps: int) -> Tables:
    """Tables of nothing learnt: one class, ids by number, no codes."""
    codes = {kind: np.zeros((contexts, 256), np.uint16) for kind, contexts in KINDS.items()}
    return Tables(vocab_size=vocab_size, steps=steps, common=_NONE, leading=(_NONE,), codes=codes)


_NONE: Ids = np.empty(0, np.int32)
