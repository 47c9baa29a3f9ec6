"""What a codec is, and the table of those that this reader knows.

A codec turns a record's teacher signal into payload cells and back. Its name and version stand in the Contract. A
version is never changed once shards exist: a better one is a new class with a new row in `CODECS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Protocol

from shards.contract import Contract
from shards.errors import Corrupt, UnknownVersion
from shards.framing import RESTORE
from shards.planes.codec import Planes3
from shards.planes.tables import fingerprint
from shards.record import AttentionSummary, Int32, Record
from shards.signal import Signal
from shards.topk_planes import TopkPlanes1


class Codec(Protocol):
    """One version of the payload. Built for a contract, whose `codec` is its `name`."""

    name: ClassVar[str]

    def __init__(self, contract: Contract, tables: bytes | None) -> None:
        """`tables` are those that the contract names, None where it names none.

        Raises UnknownVersion for a contract that this codec cannot carry, Corrupt for tables that mean nothing.
        """

    def encode_signals(self, records: Sequence[Record]) -> list[bytes]:
        """One `signal` cell a record; the records are valid under the contract."""

    def encode_attention(self, record: Record) -> bytes:
        """The `attention` cell of a record that has a summary."""

    def decode_signal(self, cell: bytes | memoryview, *, labels_N: Int32, entries: int) -> Signal:
        """The distributions of a cell with `entries` kept ids in all. Raises Corrupt.

        `labels_N`: the token that followed at each of its positions, which a codec need not repeat.
        """

    def decode_attention(self, cell: bytes | memoryview, *, positions: int, prompt_length: int) -> AttentionSummary:
        """The summary of a cell with N = `positions`, P = `prompt_length`. Raises Corrupt."""


CODECS: Mapping[str, type[Codec]] = {TopkPlanes1.name: TopkPlanes1, Planes3.name: Planes3}


def codec_for(contract: Contract, tables: bytes | None) -> Codec:
    """The codec that the contract names, with the tables that it names.

    Raises UnknownVersion where there is none, Corrupt where the tables are others.
    """
    if contract.codec not in CODECS:
        raise UnknownVersion(
            f"codec {contract.codec!r}, this reader knows {', '.join(CODECS)}",
            hint="upgrade minicodformer, or write the shards again",
        )
    if contract.tables != (None if tables is None else fingerprint(tables)):
        raise Corrupt("its tables are not those that its contract names", hint=RESTORE)
    return _built(contract, tables)


@lru_cache(maxsize=16)
def _built(contract: Contract, tables: bytes | None) -> Codec:
    """One for all shards of a set: expanded tables take megabytes."""
    return CODECS[contract.codec](contract, tables)
