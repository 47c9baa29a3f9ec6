"""Codecs "planes/2" and "planes/3": every selection, the tail's mass and curve, the entropy, and attention rows.

- Ids are exact. Each position belongs to one of a few learnt classes; its ids are gaps in the order of that class.
- Probabilities of the exact head are levels even in sqrt(p), scaled to sum to what the tail leaves. Those of draws are
  steps of log p; how often an id was drawn is exact.
- What the head says already is not stored again: tail, entropy and curve are differences from what it makes likely.
- Every stream of numbers is coded with a code that was learnt before the set was begun: see `tables.py`.

The versions differ in the coder of their streams alone. FORMAT.md states the bound of each error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.errors import Corrupt, UnknownVersion
from shards.planes.attention import attention_streams, read_attention
from shards.planes.draws import Draws
from shards.planes.head import Head
from shards.planes.id_sets import choose_classes
from shards.planes.numbers import Numbers
from shards.planes.outside import Outside, outside_streams, read_outside
from shards.planes.prefix import PrefixCoder
from shards.planes.rans import RansCoder
from shards.planes.streams import StreamCoder, StreamReader, Streams
from shards.planes.tables import Tables
from shards.record import AttentionSummary, Record, keys_in_sight
from shards.schema import MAX_ENTRIES
from shards.signal import Signal

Float64 = NDArray[np.float64]


class Planes:
    """What the versions share."""

    name: ClassVar[str]
    coding: ClassVar[type[StreamCoder]]

    def __init__(self, contract: Contract, tables: bytes | None) -> None:
        if tables is None:
            raise UnknownVersion(f"codec {self.name!r} needs tables, and its contract names none")
        self._contract = contract
        self._tables = Tables.from_bytes(tables, contract.vocab_size, self.coding)
        self._coder = self._tables.coder

    def encode_signals(self, records: Sequence[Record]) -> list[bytes]:
        return [self._coder.pack(self.signal_streams(record)) for record in records]

    def signal_streams(self, record: Record) -> Streams:
        """The streams of a record's `signal` cell, in their order."""
        selection, tables = self._contract.selection, self._tables
        k = min(selection.k, record.ids_NK.shape[1])
        classes_N = choose_classes(record.ids_NK, tables)
        yield "classes", classes_N
        kept: Head | Draws | None = None
        if selection.kind != "sample":
            assert record.logprobs_NK is not None, "a valid record has what its contract says"
            kept = Head.of(record.ids_NK[:, :k], record.logprobs_NK[:, :k], classes_N, tables)
            if selection.kind == "adaptive":
                yield "sizes", kept.sizes_N - 1
            yield from kept.streams()
        if selection.draws:
            assert record.draws_NK is not None, "a valid record has what its contract says"
            logprobs_NK = None if record.logprobs_NK is None else record.logprobs_NK[:, k:]
            draws = Draws.of(record.ids_NK[:, k:], record.draws_NK[:, k:], logprobs_NK, classes_N, tables)
            yield "sizes", draws.sizes_N
            yield from draws.streams()
            kept = kept or draws
        assert kept is not None, "every selection has a head or draws"
        yield from outside_streams(_outside(record, self._contract, k), kept, tables.vocab_size)

    def decode_signal(self, cell: bytes | memoryview, *, positions: int, entries: int) -> Signal:
        selection, tables, reader = self._contract.selection, self._tables, self._coder.reader(cell)
        classes_N = _read_classes(reader, positions, tables)
        head = draws = None
        if selection.kind != "sample":
            head = Head.read(reader, classes_N, self._head_sizes(reader, positions), tables)
        if selection.draws:
            sizes_N = _bounded(reader.take("sizes", positions), least=head is None, most=selection.draws)
            draws = Draws.read(reader, classes_N, sizes_N, tables, draws=selection.draws, logprobs=selection.logprobs)
        kept = head or draws
        assert kept is not None, "every selection has a head or draws"
        outside = read_outside(
            reader,
            kept,
            positions=positions,
            vocab_size=tables.vocab_size,
            tail_known=selection.tail_known,
            nodes=len(self._contract.curve),
        )
        reader.end()
        held = sum(int(part.sizes_N.sum()) for part in (head, draws) if part is not None)
        if held != entries:
            raise Corrupt(f"a payload holds {held} ids where {entries} belong")
        return _signal(outside, head, draws, tables, tail_known=selection.tail_known)

    def encode_attention(self, record: Record) -> bytes:
        return self._coder.pack(self.attention_streams(record))

    def attention_streams(self, record: Record) -> Streams:
        """The streams of a record's `attention` cell, in their order."""
        assert record.attention is not None, "a valid record has what its contract says"
        prompt_length = len(record.prompt_ids_P)
        return attention_streams(record.attention, self._sight_N(record.positions, prompt_length), prompt_length)

    def decode_attention(self, cell: bytes | memoryview, *, positions: int, prompt_length: int) -> AttentionSummary:
        reader, spec = self._coder.reader(cell), self._contract.attention
        assert spec is not None, "only a contract with attention has the column"
        summary = read_attention(reader, spec, self._sight_N(positions, prompt_length), prompt_length)
        reader.end()
        return summary

    def _sight_N(self, positions: int, prompt_length: int) -> Numbers:
        assert self._contract.attention is not None
        return keys_in_sight(self._contract.attention, positions=positions, prompt_length=prompt_length)

    def _head_sizes(self, reader: StreamReader, positions: int) -> Numbers:
        k = self._contract.selection.k
        if self._contract.selection.kind != "adaptive":
            return np.full(positions, k, np.int32)
        return _bounded(reader.take("sizes", positions) + 1, least=1, most=k)


class Planes2(Planes):
    name: ClassVar[str] = "planes/2"
    coding: ClassVar[type[StreamCoder]] = PrefixCoder


class Planes3(Planes):
    name: ClassVar[str] = "planes/3"
    coding: ClassVar[type[StreamCoder]] = RansCoder


VERSIONS: Mapping[str, type[Planes]] = {version.name: version for version in (Planes2, Planes3)}


def _outside(record: Record, contract: Contract, k: int) -> Outside:
    """A record's masses in double precision."""
    known = contract.selection.tail_known
    log_head_N, log_tail_N = np.full(record.positions, -np.inf), record.log_tail_N.astype(np.float64)
    if contract.selection.kind != "sample":
        assert record.logprobs_NK is not None, "a valid record has what its contract says"
        mass_N = np.exp(record.logprobs_NK[:, :k].astype(np.float64)).sum(axis=1)
        log_head_N = np.log(mass_N)
        if not known:
            with np.errstate(divide="ignore"):
                log_tail_N = np.log((1 - mass_N).clip(0))
    return Outside(
        log_head_N=log_head_N,
        log_tail_N=log_tail_N,
        entropy_N=record.entropy_N.astype(np.float64) if known else None,
        curve_NJ=None if record.curve_NJ is None else record.curve_NJ.astype(np.float64),
    )


def _signal(outside: Outside, head: Head | None, draws: Draws | None, tables: Tables, *, tail_known: bool) -> Signal:
    unknown_N = np.full(len(outside.log_tail_N), np.nan, np.float32)
    ids_NK, logprobs_NK, draws_NK = _entries(outside, head, draws, tables)
    return Signal(
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        draws_NK=draws_NK,
        log_tail_N=outside.log_tail_N.astype(np.float32) if tail_known else unknown_N,
        entropy_N=unknown_N if outside.entropy_N is None else outside.entropy_N.astype(np.float32),
        curve_NJ=None if outside.curve_NJ is None else outside.curve_NJ.astype(np.float32),
    )


def _entries(
    outside: Outside, head: Head | None, draws: Draws | None, tables: Tables
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None, NDArray[np.int32] | None]:
    """Ids, log-probabilities and counts: those of the head, then those that were drawn."""
    if head is None:
        assert draws is not None, "every selection has a head or draws"
        ids_NK, counts_NK, logprobs_NK = draws.entries(tables)
        return ids_NK, logprobs_NK, counts_NK
    ids_NK, logprobs_NK = head.entries(outside.log_head_N - np.log(head.power_N), tables)
    if draws is None:
        return ids_NK, logprobs_NK, None
    drawn_NK, counts_NK, drawn_logprobs_NK = draws.entries(tables)
    assert drawn_logprobs_NK is not None, "a selection with a head keeps log-probabilities"
    return (
        np.concatenate([ids_NK, drawn_NK], axis=1),
        np.concatenate([logprobs_NK, drawn_logprobs_NK], axis=1),
        np.concatenate([np.zeros_like(ids_NK), counts_NK], axis=1),
    )


def _read_classes(reader: StreamReader, positions: int, tables: Tables) -> Numbers:
    classes_N = reader.take("classes", positions)
    if classes_N.max() >= len(tables.leading):
        raise Corrupt(f"a payload names class {classes_N.max()} of {len(tables.leading)}")
    return classes_N


def _bounded(sizes_N: Numbers, *, least: int, most: int) -> Numbers:
    """Sizes that may be allocated for. Raises Corrupt."""
    longest = int(sizes_N.max())
    if sizes_N.min() < least or longest > most or longest * len(sizes_N) > MAX_ENTRIES:
        raise Corrupt(f"a payload keeps {sizes_N.min()} to {longest} ids at {len(sizes_N)} positions")
    return sizes_N
