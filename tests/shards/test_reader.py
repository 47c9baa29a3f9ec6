"""A set as sequences: random access, plain columns, bounded mappings, damage named."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards import reader
from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, ShardError, Truncated
from shards.reader import ShardReader, ShardSet
from shards.record import Record
from shards.writer import build_shard


def test_a_split_is_a_sequence_in_the_order_of_writing(folder: Path, written: list[Record]) -> None:
    train = ShardSet(folder).split("train")
    assert len(train) == 7
    for index in (3, 0, 6, -1, -7):
        assert train[index].sample_id == written[index].sample_id
    assert [record.sample_id for record in train] == [record.sample_id for record in written]
    assert [record.sample_id for record in train[2:5]] == [record.sample_id for record in written[2:5]]
    for index in (7, -8):
        with pytest.raises(IndexError):
            train[index]


def test_a_record_carries_what_was_written(folder: Path, written: list[Record]) -> None:
    for truth, record in zip(written, ShardSet(folder).split("train"), strict=True):
        np.testing.assert_array_equal(record.prompt_ids_P, truth.prompt_ids_P, strict=True)
        np.testing.assert_array_equal(record.response_ids_R, truth.response_ids_R, strict=True)
        assert record.first_position == truth.first_position
        assert record.positions == truth.positions
        np.testing.assert_array_equal(np.sort(record.ids_NK), np.sort(truth.ids_NK), strict=True)


def test_lengths_and_statistics_come_from_plain_columns(
    folder: Path, written: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a payload was read")

    monkeypatch.setattr(ShardReader, "__getitem__", forbidden)
    train = ShardSet(folder).split("train")
    assert train.sample_ids.tolist() == [record.sample_id for record in written]
    assert train.prompt_lengths.tolist() == [len(record.prompt_ids_P) for record in written]
    assert train.response_lengths.tolist() == [len(record.response_ids_R) for record in written]
    assert train.positions.tolist() == [record.positions for record in written]
    coverage = [np.exp(record.logprobs_NK.astype(float)).sum(1) for record in written]
    np.testing.assert_allclose(train.column("mean_coverage"), [row.mean() for row in coverage], rtol=1e-6)
    np.testing.assert_allclose(train.column("min_coverage"), [row.min() for row in coverage], rtol=1e-6)
    np.testing.assert_allclose(train.column("mean_entropy"), [record.entropy_N.mean() for record in written], rtol=1e-6)


def test_any_arrow_reader_sees_the_plain_columns(folder: Path, written: list[Record]) -> None:
    table = pa.ipc.open_file(str(folder / "train-0.arrow")).read_all()
    assert table["sample_id"].to_pylist() == [record.sample_id for record in written[:3]]
    assert table["prompt_ids"].to_pylist() == [record.prompt_ids_P.tolist() for record in written[:3]]
    assert table["response_ids"].to_pylist() == [record.response_ids_R.tolist() for record in written[:3]]


def test_reading_one_row_touches_no_other(folder: Path) -> None:
    path = folder / "train-0.arrow"
    with ShardReader.open(path) as shard:
        cells = [bytes(shard._cells[name][row]) for name in shard._cells for row in (0, 2)]
    data = path.read_bytes()
    for cell in cells:
        data = data.replace(cell, bytes(255 - byte for byte in cell))
    path.write_bytes(data)
    with ShardReader.open(path) as shard:
        assert shard[1].positions == 3
        for row in (0, 2):
            with pytest.raises(Corrupt, match=f"record {row}"):
                shard[row]


def test_few_shards_are_mapped_at_once_and_threads_may_share_a_set(
    folder: Path, written: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 1)
    shards = ShardSet(folder)
    train = shards.split("train")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: train[index].sample_id, [*range(7)] * 30))
    assert found == [record.sample_id for record in written] * 30
    assert len(shards._open) == 1


def test_an_unknown_split_names_those_there_are(folder: Path) -> None:
    assert ShardSet(folder).splits == ("dev", "train")
    with pytest.raises(ValueError, match="dev, train"):
        ShardSet(folder).split("test")


def test_R2_a_shard_shorter_than_its_manifest_says_is_truncated(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    (folder / "train-0.arrow").write_bytes(build_shard("train-0", "train", contract, written[:1]))
    with pytest.raises(Truncated, match=r"train-0\.arrow"):
        ShardSet(folder).split("train")[0]


def test_R3_a_shard_of_another_contract_in_a_sealed_set_is_refused_before_it_is_read(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    other = dataclasses.replace(contract, tokenizer_fingerprint="4" * 64)
    (folder / "train-0.arrow").write_bytes(build_shard("train-0", "train", other, written[:3]))
    with pytest.raises(ShardError, match="tokenizer_fingerprint"):
        _ = ShardSet(folder).split("train")[0]


def resident(folder: Path) -> int:
    """KiB of the folder's shards that are mapped into this process."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ", 1)[0].endswith(":"):
            inside = line.endswith(".arrow") and str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_what_was_read_is_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ShardSet(folder).split("train")
    monkeypatch.setattr(reader, "MAX_RESIDENT", 1 << 40)
    names = [record.sample_id for record in train]
    kept = resident(folder)
    assert kept > 0
    monkeypatch.setattr(reader, "MAX_RESIDENT", 1)
    assert train[0].sample_id == names[0]
    assert resident(folder) < kept
    assert [record.sample_id for record in train] == names
    assert resident(folder) == 0


def test_a_file_of_the_teacher_is_read_as_it_was_sealed(folder: Path) -> None:
    shards, path = ShardSet(folder), folder / "teacher" / "tokenizer.json"
    assert shards.teacher_file("tokenizer.json") == path.read_bytes()
    path.write_bytes(b"[]")
    with pytest.raises(Corrupt, match=r"tokenizer\.json differs from manifest\.json"):
        shards.teacher_file("tokenizer.json")
    path.unlink()
    with pytest.raises(Incomplete, match=r"tokenizer\.json cannot be opened"):
        shards.teacher_file("tokenizer.json")
