"""The file of a set's plain columns: damage is found, and whatever it holds, only a ShardError comes of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards.columns import SCHEMA, Columns, ColumnsInfo
from shards.errors import Corrupt, ShardError, Truncated
from shards.manifest import read_manifest
from shards.reader import ShardSet
from shards.schema import LENGTHS, STATISTICS
from shards.storage import LocalStorage


@pytest.fixture
def columns(folder: Path) -> ColumnsInfo:
    info = read_manifest(folder).columns
    assert info is not None
    return info


def use(folder: Path, info: ColumnsInfo, records: int = 8) -> None:
    """Open, and read everything."""
    found = Columns.open(LocalStorage(folder), info, records)
    assert len(found.sample_ids(slice(None)).to_pylist()) == records
    for name in (*LENGTHS, *STATISTICS):
        assert len(found.numbers(name, slice(None)).copy()) == records


def test_R1_one_flipped_bit_of_every_byte_is_found(folder: Path, columns: ColumnsInfo) -> None:
    path, rng = folder / columns.name, np.random.default_rng(2)
    data = path.read_bytes()
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(Corrupt, match=r"columns/.* differs from its checksum"):
            use(folder, columns)


def test_R2_cut_at_any_length_it_is_truncated(folder: Path, columns: ColumnsInfo) -> None:
    path = folder / columns.name
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(Truncated):
            use(folder, columns)


def with_content(folder: Path, data: bytes) -> ColumnsInfo:
    """A columns file of these bytes, whose hash agrees."""
    info = ColumnsInfo(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / info.name).write_bytes(data)
    return info


def fuzz(folder: Path, data: bytes, rounds: int, seed: int) -> int:
    rng, refused = np.random.default_rng(seed), 0
    for _ in range(rounds):
        damaged = bytearray(data)
        for offset in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[offset] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        info = with_content(folder, bytes(damaged))
        try:
            use(folder, info)
        except ShardError:
            refused += 1
        (folder / info.name).unlink()
    return refused


@pytest.mark.parametrize(("rounds", "seed"), [(1_500, 3), pytest.param(40_000, 4, marks=pytest.mark.long)])
def test_R5_damaged_columns_under_a_recomputed_checksum_raise_nothing_but_shard_errors(
    folder: Path, columns: ColumnsInfo, rounds: int, seed: int
) -> None:
    refused = fuzz(folder, (folder / columns.name).read_bytes(), rounds, seed)
    assert refused > rounds // 4


def arrow_file(batch: pa.RecordBatch, **options: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def test_R4_forged_columns_are_refused_before_they_are_used(folder: Path, columns: ColumnsInfo) -> None:
    batch = pa.ipc.open_file((folder / columns.name).read_bytes()).get_batch(0)
    use(folder, with_content(folder, arrow_file(batch)))
    negative = batch.set_column(
        SCHEMA.get_field_index("positions"), SCHEMA.field("positions"), pa.array(np.full(8, -1, np.int32))
    )
    forged = [
        arrow_file(batch, compression="zstd"),
        arrow_file(batch.slice(1)),
        arrow_file(batch.rename_columns([f"x{name}" for name in batch.schema.names])),
        arrow_file(negative),
    ]
    for data in forged:
        with pytest.raises(Corrupt):
            use(folder, with_content(folder, data))


def test_columns_say_what_the_shards_say(folder: Path) -> None:
    shards = ShardSet(folder)
    for info in shards.manifest.shards:
        for name in (*LENGTHS, *STATISTICS):
            found = shards.columns.numbers(name, shards.rows_of(info))
            np.testing.assert_array_equal(found, shards.open(info).numbers(name), strict=True)
