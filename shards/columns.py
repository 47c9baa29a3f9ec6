"""The plain columns of a whole set in one file, so that opening a set of any size opens no shard.

One Arrow IPC file with one batch: the columns of one number a record, and the sample's id, shard after shard in the
order of the manifest, which names the file's hash. It repeats what the shards say and can be made again from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import framing
from shards.durable import file_sha256
from shards.errors import Corrupt, ShardError
from shards.schema import LENGTHS, STATISTICS, numbers_of
from shards.shard import ShardReader
from shards.storage import Storage

FOLDER = "columns"
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in LENGTHS),
        *(pa.field(name, pa.float32(), nullable=False) for name in STATISTICS),
    ]
)
_REMAKE = (
    "restore the file, or delete manifest.json and run the command that made the set again: "
    "it makes this file anew from the shards"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsInfo:
    """The file as the manifest lists it."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 1:
            raise ValueError(f"a file of columns has a whole number of bytes, not {self.bytes!r}")

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.sha256}.arrow"


def columns_of(shard: ShardReader) -> pa.RecordBatch:
    """The plain columns of one shard, copied out of it."""
    numbers = {name: shard.numbers(name) for name in (*LENGTHS, *STATISTICS)}
    arrays = [pa.array(shard.sample_ids, pa.string()), *(pa.array(values) for values in numbers.values())]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def publish_columns(storage: Storage, batches: Iterable[pa.RecordBatch]) -> ColumnsInfo:
    """Write the columns of all shards, in the order of the manifest."""
    batch = pa.Table.from_batches(batches, SCHEMA).combine_chunks().to_batches()[0]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    data = bytes(sink.getvalue())
    info = ColumnsInfo(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    storage.publish(info.name, data)
    return info


class Columns:
    """The columns of a set, mapped."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    @classmethod
    def open(cls, storage: Storage, info: ColumnsInfo, records: int) -> Columns:
        """Raises Corrupt where the file is not the one of the manifest, Incomplete, Truncated, StorageFailed."""
        path = storage.local(info.name, sha256=info.sha256, size=info.bytes)
        where = storage.where(info.name)
        require_same_bytes(path, info.sha256, where)
        try:
            mapped = pa.memory_map(str(path)).read_buffer()
            framing.refuse_compression(framing.split_frame(np.frombuffer(mapped, np.uint8)))
            file = pa.ipc.open_file(mapped)
            if file.num_record_batches != 1 or not file.schema.equals(SCHEMA):
                raise ValueError("other columns")
            batch = file.get_batch(0)
            batch.validate(full=True)
        except (ShardError, pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise Corrupt(f"{where}: its Arrow structure is damaged ({error})", hint=_REMAKE) from error
        whole = not any(column.null_count or column.offset for column in batch.columns)
        if not whole or batch.num_rows != records or min(_least(batch, name) for name in LENGTHS) < 0:
            raise Corrupt(f"{where} does not hold the columns of {records} records", hint=_REMAKE)
        return cls(batch)

    @classmethod
    def gathered(cls, batches: Iterable[pa.RecordBatch]) -> Columns:
        """From the shards themselves, for a set whose manifest names no such file."""
        return cls(pa.Table.from_batches(batches, SCHEMA).combine_chunks().to_batches()[0])

    def numbers(self, name: str, rows: slice) -> NDArray[np.int32] | NDArray[np.float32]:
        """One number for each record of `rows`, not copied. Raises ValueError where there is no such column."""
        if name not in (*LENGTHS, *STATISTICS):
            raise ValueError(f"no column of numbers {name!r}: there are {', '.join((*LENGTHS, *STATISTICS))}")
        return numbers_of(self._batch.column(name))[rows]

    def sample_ids(self, rows: slice) -> pa.Array:
        return self._batch.column("sample_id")[rows]


def _least(batch: pa.RecordBatch, name: str) -> int:
    return int(numbers_of(batch.column(name)).min(initial=0))


def require_same_bytes(path: Path, sha256: str, where: str) -> None:
    """Raise Corrupt where a file differs from the hash that the manifest states."""
    if file_sha256(path) != sha256:
        raise Corrupt(f"{where} differs from its checksum in the manifest", hint=_REMAKE)
