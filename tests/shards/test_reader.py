"""A set as sequences: random access, plain columns, bounded mappings, damage named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards import reader
from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, ShardError, Truncated
from shards.inspect import inspect_shard, verify_shards
from shards.manifest import begin, seal
from shards.reader import ShardReader, ShardSet
from shards.record import Record
from shards.writer import build_shard, write_shard


@pytest.fixture
def written(contract: Contract, make_record: Callable[..., Record]) -> list[Record]:
    """Seven records of train, in order, of different lengths."""
    return [make_record(contract, seed, prompt=3 + seed, response=2 + seed % 4) for seed in range(7)]


@pytest.fixture
def folder(tmp_path: Path, contract: Contract, written: list[Record], make_record: Callable[..., Record]) -> Path:
    begin(tmp_path, contract)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    infos = [
        write_shard(tmp_path, f"train-{number}", "train", contract, written[start : start + 3])
        for number, start in enumerate(range(0, 7, 3))
    ]
    infos.append(write_shard(tmp_path, "dev-0", "dev", contract, [make_record(contract, 99)]))
    seal(tmp_path, contract, infos)
    return tmp_path


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


def swap_shard(folder: Path, contract: Contract, written: list[Record]) -> None:
    """A whole shard of the same size and shape, but not the one that the manifest names."""
    renamed = [dataclasses.replace(record, sample_id=record.sample_id.upper()) for record in written[:3]]
    (folder / "train-0.arrow").write_bytes(build_shard("train-0", "train", contract, renamed))


def flip_cell(folder: Path, contract: Contract, written: list[Record]) -> None:
    path = folder / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(written[4].prompt_ids_P.tobytes())] ^= 1
    path.write_bytes(data)


def remove_shard(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "dev-0.arrow").unlink()


def edit_teacher_file(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "teacher" / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "name", "error", "said"),
    [
        (swap_shard, "train-0.arrow", Corrupt, "not the one of manifest.json"),
        (flip_cell, "train-1.arrow", Corrupt, "record 1: prompt_ids differs"),
        (remove_shard, "dev-0.arrow", Incomplete, "cannot be opened"),
        (edit_teacher_file, "teacher/tokenizer.json", Corrupt, "differs from manifest.json"),
    ],
)
def test_R1_verify_names_what_is_damaged_and_how(
    folder: Path, contract: Contract, written: list[Record], damage: Any, name: str, error: type[ShardError], said: str
) -> None:
    ShardSet(folder).verify()
    assert verify_shards(folder).intact
    damage(folder, contract, written)
    with pytest.raises(error, match=said):
        ShardSet(folder).verify()
    report = verify_shards(folder)
    assert not report.intact
    assert list(report.damage) == [name]
    assert said in report.damage[name]


def test_verification_reports_all_damage_and_its_progress(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    flip_cell(folder, contract, written)
    edit_teacher_file(folder, contract, written)
    remove_shard(folder, contract, written)
    told: list[tuple[int, int]] = []
    report = verify_shards(folder, progress=lambda done, total: told.append((done, total)))
    assert sorted(report.damage) == ["dev-0.arrow", "teacher/tokenizer.json", "train-1.arrow"]
    assert (report.shards, report.teacher_files) == (4, 1)
    assert told[-1] == (report.bytes, report.bytes)
    assert len(told) == 4


def test_inspection_states_the_facts(folder: Path, contract: Contract, written: list[Record]) -> None:
    path = folder / "train-0.arrow"
    facts = inspect_shard(path, record=1, decode=lambda ids: " ".join(map(str, ids)))
    positions = sum(record.positions for record in written[:3])
    assert (facts.contract, facts.unit, facts.split) == (contract, "train-0", "train")
    assert (facts.records, facts.positions, facts.entries) == (3, positions, positions * contract.selection.k)
    assert facts.bytes == path.stat().st_size
    assert facts.damage is None
    parts = dict(facts.bytes_per_position)
    assert parts.pop("all") == pytest.approx(facts.bytes / positions)
    assert sum(parts.values()) == pytest.approx(facts.bytes / positions)
    assert set(parts) == {"signal", "attention", "tokens", "columns"}
    entropies = sorted(float(record.entropy_N.mean()) for record in written[:3])
    found = facts.entropy
    assert (found.minimum, found.median, found.maximum) == pytest.approx(entropies)

    assert facts.record is not None
    truth, shown = written[1], facts.record
    assert shown.sample_id == truth.sample_id
    assert shown.prompt == " ".join(map(str, truth.prompt_ids_P))
    assert [position.token_id for position in shown.positions] == truth.response_ids_R.tolist()
    id_, text, probability = shown.positions[0].alternatives[0]
    assert text == str(id_)
    assert probability == pytest.approx(float(np.exp(truth.logprobs_NK[0, 0])), abs=0.02)


def test_inspection_of_a_damaged_shard_reports_the_damage(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    flip_cell(folder, contract, written)
    facts = inspect_shard(folder / "train-1.arrow")
    assert facts.damage is not None
    assert "record 1" in facts.damage
    assert facts.record is None
    with pytest.raises(ValueError, match="records 0 to 2"):
        inspect_shard(folder / "train-1.arrow", record=3)
