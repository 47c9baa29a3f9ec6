"""Codec "planes/3": every selection, the tail's mass and curve, the entropy, and attention rows.

- Ids are exact. Each position belongs to one of a few learnt classes; its ids are gaps in the order of that class.
- Probabilities of the exact head are levels even in sqrt(p), scaled to sum to what the tail leaves. Those of draws are
  steps of log p; how often an id was drawn is exact.
- What is known already is not stored again: the label, whose token stands beside the signal, is not among the ids;
  tail, entropy and curve are differences from what the head makes likely.
- Every stream of numbers is coded with a code that was learnt before the set was begun: see `tables.py`.

FORMAT.md states the bound of each error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.errors import Corrupt, UnknownVersion
from shards.planes.attention import attention_streams, read_attention
from shards.planes.curves import curve_streams, read_curve
from shards.planes.draws import Draws, draw_streams, entropy_of_draws, read_draws
from shards.planes.head import Head, head_streams, read_head
from shards.planes.head_writing import ENTROPY_SCALE
from shards.planes.id_sets import choose_classes
from shards.planes.numbers import Numbers, unzigzag, zigzag
from shards.planes.rans import Stream
from shards.planes.tables import Tables
from shards.record import AttentionSummary, Record, keys_in_sight
from shards.schema import MAX_ENTRIES
from shards.signal import Signal

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class Planes3:
    """Threads may share it."""

    name: ClassVar[str] = "planes/3"

    def __init__(self, contract: Contract, tables: bytes | None) -> None:
        if tables is None:
            raise UnknownVersion(f"codec {self.name!r} needs tables, and its contract names none")
        self._contract = contract
        self._tables = Tables.from_bytes(tables, contract.vocab_size)
        self._coder = self._tables.coder

    def encode_signals(self, records: Sequence[Record]) -> list[bytes]:
        return [self._coder.pack(self.signal_streams(record)) for record in records]

    def signal_streams(self, record: Record) -> Iterator[Stream]:
        """The streams of a record's `signal` cell, in their order."""
        selection, tables = self._contract.selection, self._tables
        labels_N, classes_N = record.labels_N, choose_classes(record.ids_NK, tables)
        k, logprobs_NK = min(selection.k, record.ids_NK.shape[1]), record.logprobs_NK
        log_tail_N = np.zeros(record.positions)
        yield Stream("classes", classes_N)
        if selection.kind != "sample":
            assert logprobs_NK is not None, "a valid record has what its contract says"
            streams, log_tail_N = head_streams(
                record.ids_NK[:, :k],
                logprobs_NK[:, :k],
                record.log_tail_N,
                record.entropy_N,
                labels_N,
                classes_N,
                tables,
                sized=selection.kind == "adaptive",
                tail_known=selection.tail_known,
            )
            yield from streams
        if selection.draws:
            assert record.draws_NK is not None, "a valid record has what its contract says"
            drawn_NK = None if logprobs_NK is None else logprobs_NK[:, k:]
            counts_NK = record.draws_NK[:, k:]
            yield from draw_streams(record.ids_NK[:, k:], counts_NK, drawn_NK, labels_N, classes_N, tables)
            if selection.kind == "sample":
                steps_N = np.rint(ENTROPY_SCALE * (record.entropy_N - entropy_of_draws(counts_NK)))
                yield Stream("entropy", zigzag(steps_N.astype(np.int32)))
        if record.curve_NJ is not None:
            yield from curve_streams(record.curve_NJ.astype(np.float64), log_tail_N)

    def decode_signal(self, cell: bytes | memoryview, *, labels_N: Int32, entries: int) -> Signal:
        selection, tables, reader = self._contract.selection, self._tables, self._coder.reader(cell)
        positions = len(labels_N)
        head = draws = None
        log_tail_N, entropy_N, held = np.zeros(positions), None, 0
        if selection.kind == "sample":
            classes_N = reader.take("classes", positions)
            if classes_N.max() >= len(tables.leading):
                raise Corrupt("a payload names a class that does not exist")
        else:
            head = read_head(reader, labels_N, tables, selection)
            log_tail_N, entropy_N, classes_N, held = head.log_tail_N, head.entropy_N, head.classes_N, head.held
        if selection.draws:
            sizes_N = reader.take("sizes", positions)
            held += _drawn(sizes_N, least=head is None, most=selection.draws)
            draws = read_draws(
                reader, classes_N, sizes_N, labels_N, tables, draws=selection.draws, logprobs=selection.logprobs
            )
            if head is None:
                numbers_N = reader.take("entropy", positions)
                entropy_N = entropy_of_draws(draws.counts_NK) + unzigzag(numbers_N) / ENTROPY_SCALE
        nodes = len(self._contract.curve)
        curve_NJ = read_curve(reader, log_tail_N, nodes).astype(np.float32) if nodes else None
        reader.end()
        if held != entries:
            raise Corrupt(f"a payload holds {held} ids where {entries} belong")
        ids_NK, logprobs_NK, draws_NK = _entries(head, draws)
        unknown_N = np.full(positions, np.nan, np.float32)
        return Signal(
            ids_NK=ids_NK,
            logprobs_NK=logprobs_NK,
            draws_NK=draws_NK,
            log_tail_N=log_tail_N.astype(np.float32) if selection.tail_known else unknown_N,
            entropy_N=unknown_N if entropy_N is None else entropy_N.astype(np.float32),
            curve_NJ=curve_NJ,
        )

    def encode_attention(self, record: Record) -> bytes:
        return self._coder.pack(self.attention_streams(record))

    def attention_streams(self, record: Record) -> Iterator[Stream]:
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


def _entries(head: Head | None, draws: Draws | None) -> tuple[Int32, Float32 | None, Int32 | None]:
    """Ids, log-probabilities and counts: those of the head, then those that were drawn."""
    if head is None:
        assert draws is not None, "every selection has a head or draws"
        return draws.ids_NK, draws.logprobs_NK, draws.counts_NK
    if draws is None:
        return head.ids_NK, head.logprobs_NK, None
    assert draws.logprobs_NK is not None, "a selection with a head keeps log-probabilities"
    return (
        np.concatenate([head.ids_NK, draws.ids_NK], axis=1),
        np.concatenate([head.logprobs_NK, draws.logprobs_NK], axis=1),
        np.concatenate([np.zeros_like(head.ids_NK), draws.counts_NK], axis=1),
    )


def _drawn(sizes_N: Numbers, *, least: int, most: int) -> int:
    """The sum of sizes that may be allocated for. Raises Corrupt."""
    longest = int(sizes_N.max())
    if sizes_N.min() < least or longest > most or longest * len(sizes_N) > MAX_ENTRIES:
        raise Corrupt(f"a payload keeps {sizes_N.min()} to {longest} ids at {len(sizes_N)} positions")
    return int(sizes_N.sum(dtype=np.int64))
