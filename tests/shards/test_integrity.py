"""R1, R2: no damage is read as data, and a cut file is told from a damaged one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards import framing
from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, ShardError, Truncated
from shards.record import Record
from shards.shard import ShardReader
from shards.writer import build_shard

Same = Callable[[Record, Record], None]


def read_all(path: Path) -> list[Record]:
    with ShardReader.open(path) as shard:
        return [shard[row] for row in range(len(shard))]


def flips(path: Path, masks: Callable[[int], Iterator[int]]) -> Iterator[int]:
    """Damage each byte in turn, in place; yields its offset while it is damaged."""
    with path.open("r+b", buffering=0) as file:
        for offset, byte in enumerate(path.read_bytes()):
            for mask in masks(offset):
                file.seek(offset)
                file.write(bytes([byte ^ mask]))
                yield offset
            file.seek(offset)
            file.write(bytes([byte]))


def unread(path: Path) -> set[int]:
    """Offsets that no read uses: Arrow's padding within the body, and the digits of the seal."""
    data = path.read_bytes()
    whole = pa.py_buffer(data)
    file = pa.ipc.open_file(whole)
    batch = file.get_batch(0)
    used: set[int] = set()
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer is not None:
                start = buffer.address - whole.address
                used |= set(range(start, start + buffer.size))
    frame = framing.split_frame(np.frombuffer(data, np.uint8))
    seal = data.rindex(file.metadata[b"seal"])
    return set(range(frame.body_start, frame.body_end)) - used | set(range(seal, seal + 64))


def require_flips_found(path: Path, same: Same, masks: Callable[[int], Iterator[int]]) -> None:
    intact = read_all(path)
    passed_over: set[int] = set()
    messages: list[str] = []
    for offset in flips(path, masks):
        with pytest.raises(ShardError), ShardReader.open(path) as shard:
            shard.verify()
        try:
            found = read_all(path)
        except ShardError as error:
            messages.append(str(error))
            continue
        for left, right in zip(found, intact, strict=True):
            same(left, right)
        passed_over.add(offset)
    assert all(str(path) in message for message in messages)
    assert passed_over == unread(path), "a read passes over damage in what it does not use, and over no other"


def test_R1_one_flipped_bit_of_every_byte_is_found(shard: Path, same: Same) -> None:
    rng = np.random.default_rng(1)
    require_flips_found(shard, same, lambda offset: iter([1 << int(rng.integers(8))]))


@pytest.mark.long
def test_R1_every_flipped_bit_of_every_byte_is_found(shard: Path, same: Same) -> None:
    require_flips_found(shard, same, lambda offset: (1 << bit for bit in range(8)))


def test_R1_damage_in_a_cell_names_shard_and_record_and_leaves_the_other_rows_readable(
    shard: Path, records: list[Record]
) -> None:
    with ShardReader.open(shard) as reader:
        cell = bytes(reader._cells["signal"][1])
    data = bytearray(shard.read_bytes())
    data[data.index(cell) + len(cell) // 2] ^= 1
    shard.write_bytes(data)
    with ShardReader.open(shard) as reader:
        assert reader[0].sample_id == records[0].sample_id
        with pytest.raises(Corrupt, match=r"train-00000\.arrow: record 1: signal differs"):
            reader[1]
        with pytest.raises(Corrupt, match="record 1"):
            reader.verify()


def test_R1_cells_that_changed_places_are_found(shard: Path, contract: Contract, make_record: Any) -> None:
    twins = [dataclasses.replace(make_record(contract, 0), sample_id=name) for name in "ab"]
    data = build_shard("u", "train", contract, twins)
    shard.write_bytes(data)
    with ShardReader.open(shard) as reader:
        first, second = (bytes(reader._checks[row]) for row in range(2))
    assert data.count(first + second) == 1
    shard.write_bytes(data.replace(first + second, second + first))
    with pytest.raises(Corrupt):
        read_all(shard)


def test_R2_a_file_cut_at_any_length_is_truncated(shard: Path) -> None:
    data = shard.read_bytes()
    for length in range(len(data)):
        shard.write_bytes(data[:length])
        with pytest.raises(Truncated):
            ShardReader.open(shard)


def test_R2_a_file_with_something_after_its_end_is_corrupt(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(Corrupt):
        ShardReader.open(shard)


def test_a_missing_file_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(Incomplete):
        ShardReader.open(tmp_path / "none.arrow")
