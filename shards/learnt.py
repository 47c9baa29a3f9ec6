"""The tables of a set that is being written: learnt once, published before anything else, the same for every writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from shards.contract import Contract
from shards.planes.calibration import learn_tables
from shards.planes.codec import VERSIONS
from shards.planes.tables import MAX_BYTES, fingerprint
from shards.record import Record
from shards.storage import Storage
from shards.validation import require_valid

TABLES_NAME = "codec.tables"
"""Beside contract.json, for writers that come later; readers take what stands in each shard."""


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

    Raises InvalidRecord for an example that could not be written, StorageFailed.
    """
    contract = dataclasses.replace(contract, tables=None)
    if contract.codec not in VERSIONS:
        return contract, None
    if storage.size(TABLES_NAME) is None:
        records = examples()
        for record in records:
            require_valid(record, contract)
        storage.prepare()
        storage.publish(TABLES_NAME, learn_tables(records, contract, budget=budget))
    tables = storage.read(TABLES_NAME, most=MAX_BYTES)
    return dataclasses.replace(contract, tables=fingerprint(tables)), tables
