"""The columns of a shard, which of their bytes are fixed, and how a cell is checked.

- One row a sample. Every column can be read by any Arrow reader; `signal` and `attention` are the codec's payloads.
- Fixed parts (numbers, sample ids, offsets, the checks themselves) are covered by the shard's index.
- Cells (tokens and payloads) are covered one by one by `checks`, so that a read of one row touches no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.contract import Contract

MAX_ROWS = 1 << 20
MAX_ENTRIES = 1 << 24
"""Kept entries of one record: 262,144 positions at k = 64."""

MAX_PROMPT = 1 << 24
MAX_COLUMN_BYTES = 1 << 31
"""Where the 32-bit offsets of a column end."""

CHECK_BYTES = 8
_TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
LENGTHS = ("first_position", "positions", "entries", "prompt_length", "response_length")
TABLES = "tables"
"""The codec's learnt tables: row 0 holds them, the other rows are empty."""
STATISTICS = ("mean_entropy", "mean_coverage", "min_coverage")


def cell_names(contract: Contract) -> tuple[str, ...]:
    """The columns whose values are checked cell by cell, in the order of their checks."""
    payloads = ("signal",) if contract.attention is None else ("signal", "attention")
    return ("prompt_ids", "response_ids", *payloads)


def schema_for(contract: Contract) -> pa.Schema:
    """The columns of every shard written under a contract."""
    cells = cell_names(contract)
    fields = {
        "sample_id": pa.string(),
        **dict.fromkeys(LENGTHS, pa.int32()),
        **dict.fromkeys(STATISTICS, pa.float32()),
        **{name: _TOKENS if name.endswith("_ids") else pa.binary() for name in cells},
        **({} if contract.tables is None else {TABLES: pa.binary()}),
        "checks": pa.binary(CHECK_BYTES * len(cells)),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def fixed_parts(batch: pa.RecordBatch) -> Iterator[NDArray[np.uint8]]:
    """The bytes that the index covers, column by column: offsets, ids, numbers and checks, without Arrow's padding."""
    rows = batch.num_rows
    for field, column in zip(batch.schema, batch.columns, strict=True):
        buffers = column.buffers()
        if pa.types.is_fixed_size_binary(field.type) or pa.types.is_primitive(field.type):
            yield _bytes(buffers[1], rows * field.type.byte_width)
            continue
        offsets = _bytes(buffers[1], 4 * (rows + 1))
        yield offsets
        if field.name == "sample_id":
            yield _bytes(buffers[2], int(offsets.view(np.int32)[-1]))


def numbers_of(column: pa.Array) -> NDArray[np.int32] | NDArray[np.float32]:
    """A column of one number a row, not copied. `Array.to_numpy` would import pandas, which takes a second."""
    where, count, offset = column.buffers()[1], len(column), 4 * column.offset
    if pa.types.is_floating(column.type):
        return np.frombuffer(where, np.float32, count, offset)
    return np.frombuffer(where, np.int32, count, offset)


def cell_check(name: str, row: int, cell: bytes | memoryview) -> bytes:
    """BLAKE2b-64 over the column's name, a zero byte, the row as 4 little-endian bytes, and the cell."""
    digest = hashlib.blake2b(name.encode() + b"\0" + row.to_bytes(4, "little"), digest_size=CHECK_BYTES)
    digest.update(cell)
    return digest.digest()


def _bytes(buffer: pa.Buffer | None, size: int) -> NDArray[np.uint8]:
    if buffer is None or size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, size)
