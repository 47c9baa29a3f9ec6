"""Records -> one shard, published whole or not at all.

- The bytes are a pure function of (unit, split, contract, records) under one version of the libraries.
- Every record is checked before the first byte is written: an exception never leaves a shard behind.
- A shard that is there already is left as it is: the first writer of a unit wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from shards.codec import Codec, codec_for
from shards.contract import Contract
from shards.framing import write_frame
from shards.record import Int32, Record
from shards.schema import MAX_COLUMN_BYTES, MAX_ROWS, TABLES, cell_check, cell_names, fixed_parts, schema_for
from shards.shard import ShardReader
from shards.storage import Location, storage_at
from shards.units import ShardInfo, publish_unit
from shards.validation import require_valid


def write_shard(
    location: Location,
    unit: str,
    split: str,
    contract: Contract,
    records: Sequence[Record],
    *,
    tables: bytes | None = None,
) -> ShardInfo:
    """Publish the shard of a unit with one row a record, in order, and describe the shard that is there now.

    `tables` are those that the contract names. Where another writer was first, its shard stays and is described, once
    it is known to be of the same contract.
    Raises InvalidRecord, StorageFailed, ContractMismatch, or what reading a damaged earlier shard raises.
    """
    data = build_shard(unit, split, contract, records, tables=tables)
    return publish_unit(storage_at(location), unit, data, contract)


def build_shard(
    unit: str, split: str, contract: Contract, records: Sequence[Record], *, tables: bytes | None = None
) -> bytes:
    """The bytes of a shard. Raises InvalidRecord before anything is encoded, ValueError for too many records."""
    if not 1 <= len(records) <= MAX_ROWS:
        raise ValueError(f"a shard holds 1 to {MAX_ROWS} records, not {len(records)}")
    for record in records:
        require_valid(record, contract)
    cells = _cells(codec_for(contract, tables), contract, records)
    columns = {
        "sample_id": [record.sample_id for record in records],
        **_numbers(records),
        **cells,
        TABLES: [tables or b"", *[b""] * (len(records) - 1)],
        "checks": [
            b"".join(cell_check(name, row, _bytes(column[row])) for name, column in cells.items())
            for row in range(len(records))
        ],
    }
    schema = schema_for(contract)
    described = {b"contract": contract.to_json().encode(), b"unit": unit.encode(), b"split": split.encode()}
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema.with_metadata(described))
    return write_frame(batch, fixed_parts(batch))


def rewrapped(shard: ShardReader, unit: str, contract: Contract) -> bytes:
    """The bytes of a shard that holds another's rows as they are, for a contract under which they mean the same."""
    batch = shard.batch
    described = {**batch.schema.metadata, b"contract": contract.to_json().encode(), b"unit": unit.encode()}
    return write_frame(batch.replace_schema_metadata(described), fixed_parts(batch))


def _cells(codec: Codec, contract: Contract, records: Sequence[Record]) -> dict[str, Sequence[Int32] | Sequence[bytes]]:
    """The columns that are checked cell by cell."""
    columns: dict[str, Sequence[Int32] | Sequence[bytes]] = {
        "prompt_ids": [record.prompt_ids_P for record in records],
        "response_ids": [record.response_ids_R for record in records],
        "signal": codec.encode_signals(records),
    }
    if contract.attention is not None:
        columns["attention"] = [codec.encode_attention(record) for record in records]
    assert tuple(columns) == cell_names(contract)
    for name, column in columns.items():
        size = sum(len(_bytes(cell)) for cell in column)
        if size >= MAX_COLUMN_BYTES:
            raise ValueError(f"{name} takes {size} bytes, a column less than {MAX_COLUMN_BYTES}: use fewer records")
    return columns


def _bytes(cell: Int32 | bytes) -> bytes:
    return cell if isinstance(cell, bytes) else cell.tobytes()


def _numbers(records: Sequence[Record]) -> dict[str, object]:
    """The plain columns of one number a record, statistics in the precision that the teacher gave."""
    coverages = [record.coverage_N for record in records]
    return {
        "first_position": [record.first_position for record in records],
        "positions": [record.positions for record in records],
        "entries": [int((record.ids_NK >= 0).sum()) for record in records],
        "prompt_length": [len(record.prompt_ids_P) for record in records],
        "response_length": [len(record.response_ids_R) for record in records],
        "mean_entropy": np.array([record.entropy_N.mean(dtype=np.float64) for record in records], np.float32),
        "mean_coverage": np.array([coverage_N.mean() for coverage_N in coverages], np.float32),
        "min_coverage": np.array([coverage_N.min() for coverage_N in coverages], np.float32),
    }
