"""The tables of a set that is being written: learnt once, published before anything else, the same for every writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from shards.contract import Contract
from shards.errors import Corrupt
from shards.manifest import CONTRACT_NAME, TABLES_NAME, read_contract
from shards.planes.codec import Planes3
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import MAX_BYTES, fingerprint
from shards.record import Record
from shards.shard import ShardReader
from shards.storage import Storage
from shards.units import describe, published_units
from shards.validation import require_valid

EXAMPLES = 256
"""Records that tables are learnt from: enough for the frequent ids of all classes."""
MOST_BYTES = 1 << 17
_A_POSITION = 0.45


def tables_budget(positions: int) -> int:
    """Bytes that tables may take in shards of about so many positions: less than half a byte a position."""
    return max(1, min(MOST_BYTES, int(_A_POSITION * positions)))


def with_tables(
    storage: Storage, contract: Contract, examples: Callable[[], Sequence[Record]], *, budget: int
) -> tuple[Contract, bytes | None]:
    """The contract with the tables that its codec needs, and those tables: learnt from `examples` by the first to come.

    Where the file of a set that was begun is gone or damaged, it is taken from a shard. Raises InvalidRecord for an
    example that could not be written, Corrupt where no shard has the tables that the set was begun with, StorageFailed.
    """
    contract = dataclasses.replace(contract, tables=None)
    if contract.codec != Planes3.name:
        return contract, None
    begun = read_contract(storage) if storage.size(CONTRACT_NAME) is not None else None
    named = None if begun is None else begun.tables
    if named is not None and storage.size(TABLES_NAME) is not None and storage.sha256(TABLES_NAME) != named:
        storage.set_aside(TABLES_NAME)
    if storage.size(TABLES_NAME) is None:
        tables = _written(storage, begun) or _learnt(examples(), contract, budget)
        if named not in (None, fingerprint(tables)):
            raise Corrupt(
                f"{storage.where(TABLES_NAME)} is lost, and what is learnt now is not what {CONTRACT_NAME} names",
                hint=f"no shard was written yet: delete {storage.where(CONTRACT_NAME)} and run the same command again",
            )
        storage.prepare()
        storage.publish(TABLES_NAME, tables)
    tables = storage.read(TABLES_NAME, most=MAX_BYTES)
    return dataclasses.replace(contract, tables=fingerprint(tables)), tables


def _learnt(records: Sequence[Record], contract: Contract, budget: int) -> bytes:
    for record in records:
        require_valid(record, contract)
    return learn_tables(records, contract, budget=budget)


def _written(storage: Storage, begun: Contract | None) -> bytes | None:
    """The tables in the first shard of a set that was begun; None where it has none."""
    if begun is not None and begun.tables is not None:
        for name in published_units(storage).values():
            info = describe(storage, name, begun).info
            with ShardReader.open(storage.local(name, sha256=info.sha256, size=info.bytes)) as shard:
                return shard.tables
    return None
