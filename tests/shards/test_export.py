"""An exported set holds every decoded value, and other people's tools read it; so they read the plain columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import Corrupt, InvalidRequest
from shards.export import export_parquet
from shards.inspect import Request, inspect
from shards.learnt import with_tables
from shards.manifest import begin, read_manifest, seal
from shards.reader import ShardSet
from shards.record import Record
from shards.sample_view import SampleView
from shards.schema import LENGTHS, STATISTICS
from shards.storage import LocalStorage
from shards.writer import write_shard
from tests.shards.whole import SELECTIONS, contract_of, record_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, make_set: Callable[[Path], Path]) -> tuple[ShardSet, Path]:
    folder = make_set(tmp_path_factory.mktemp("set"))
    target = tmp_path_factory.mktemp("exported") / "new" / "folder"
    report = export_parquet(folder, target)
    assert (report.files, report.written, report.records) == (4, 4, 8)
    assert report.bytes == sum(path.stat().st_size for path in target.iterdir())
    return ShardSet(folder), target


def test_every_value_is_there_decoded(exported: tuple[ShardSet, Path]) -> None:
    shards, target = exported
    assert sorted(path.name for path in target.iterdir()) == [
        "dev-0.parquet",
        "train-0.parquet",
        "train-1.parquet",
        "train-2.parquet",
    ]
    for split in shards.splits:
        rows = pa.concat_tables([pq.read_table(path) for path in sorted(target.glob(f"{split}-*"))]).to_pylist()
        for row, record in zip(rows, shards.split(split), strict=True):
            require_equal(row, record, split)


def require_equal(row: dict[str, object], record: Record, split: str) -> None:
    assert (row["sample_id"], row["split"]) == (record.sample_id, split)
    assert (row["positions"], row["first_position"]) == (record.positions, record.first_position)
    for name in ("prompt_ids_P", "response_ids_R", "ids_NK", "logprobs_NK", "log_tail_N", "entropy_N"):
        assert row[name.rsplit("_", 1)[0]] == getattr(record, name).tolist(), name
    assert record.attention is not None
    for field in dataclasses.fields(record.attention):
        found, truth = row[f"attention_{field.name.rsplit('_', 1)[0]}"], getattr(record.attention, field.name)
        if truth.ndim == 3:
            kept = record.attention.positions_LNM >= 0
            want = [
                [truth[layer, n][kept[layer, n]].tolist() for n in range(truth.shape[1])]
                for layer in range(truth.shape[0])
            ]
            assert found == want
        else:
            assert found == truth.tolist()


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: f"{selection.kind} {selection.draws}")
def test_every_selection_is_exported_as_it_reads(selection: Selection, tmp_path: Path) -> None:
    curve = (0.5, 0.25) if selection.tail_known else ()
    contract = contract_of(selection, curve=curve, attention=AttentionSpec(layers=(0, 3), top_m=3, rows="all"))
    rng = np.random.default_rng(9)
    records = [record_of(contract, rng, positions=n, prompt=p, name=f"{n}") for n, p in ((8, 6), (1, 1), (20, 9))]
    contract, tables = with_tables(LocalStorage(tmp_path / "set"), contract, lambda: records, budget=1000)
    begin(tmp_path / "set", contract)
    info = write_shard(tmp_path / "set", "train-0", "train", contract, records, tables=tables)
    seal(tmp_path / "set", contract, [info])
    export_parquet(tmp_path / "set", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "train-0.parquet").to_pylist()
    for row, record in zip(rows, ShardSet(tmp_path / "set").split("train"), strict=True):
        for n, kept_K in enumerate(record.ids_NK >= 0):
            assert row["ids"][n] == record.ids_NK[n][kept_K].tolist()
            for name, values_NK in (("logprobs", record.logprobs_NK), ("draws", record.draws_NK)):
                assert (name in row) == (values_NK is not None)
                if values_NK is not None:
                    assert row[name][n] == values_NK[n][kept_K].tolist()
        assert ("curve" in row) == bool(curve)
        if record.curve_NJ is not None:
            assert row["curve"] == record.curve_NJ.tolist()
        assert record.attention is not None
        assert row["attention_prompt"] == record.attention.prompt_LN.tolist()
        shown = viewed(tmp_path / "set", row["sample_id"])
        assert {alternative.token.id for alternative in shown.positions[0].alternatives} <= set(row["ids"][0])


def viewed(folder: Path, sample_id: str) -> SampleView:
    """The first position of a sample, as inspect-shard shows it."""
    ids = ShardSet(folder).split("train").sample_ids.tolist()
    shown = inspect(folder, show=Request(sample=ids.index(sample_id), positions=[0])).sample
    assert shown is not None
    return shown


def test_polars_duckdb_and_datasets_read_an_export(exported: tuple[ShardSet, Path]) -> None:
    shards, target = exported
    mass = {
        record.sample_id: float(np.exp(record.logprobs_NK[0, 0]))  # type: ignore[index]
        for split in shards.splits
        for record in shards.split(split)
    }
    frame = polars.read_parquet(target / "*.parquet")
    best = frame.select("sample_id", polars.col("logprobs").list.first().list.first().exp())
    assert dict(best.rows()) == pytest.approx(mass, rel=1e-6)

    asked = f"SELECT sample_id, exp(logprobs[1][1]) FROM '{target}/*.parquet'"
    assert dict(duckdb.sql(asked).fetchall()) == pytest.approx(mass, rel=1e-6)

    loaded = datasets.load_dataset(str(target), cache_dir=str(target.parent / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 7, "validation": 1}
    assert loaded["train"][4]["ids"] == shards.split("train")[4].ids_NK.tolist()


def test_polars_duckdb_and_datasets_read_plain_columns_as_they_are(exported: tuple[ShardSet, Path]) -> None:
    """No export: a shard is an Arrow file, and so is the file of a set's columns."""
    shards, _ = exported
    folder = Path(shards.where)
    train = shards.split("train")
    truth = {name: train.column(name).tolist() for name in (*LENGTHS, *STATISTICS)}
    whole = {name: shards.split("dev").column(name).tolist() + truth[name] for name in truth}

    frame = polars.concat([polars.read_ipc(path) for path in sorted(folder.glob("train-*.arrow"))])
    assert frame.select(list(truth)).to_dict(as_series=False) == truth
    assert frame["sample_id"].to_list() == train.sample_ids.tolist()
    assert frame["response_ids"].to_list() == [record.response_ids_R.tolist() for record in train]
    assert shards.manifest.columns is not None
    columns = folder / shards.manifest.columns.name
    assert polars.scan_ipc(columns).select(list(whole)).collect().to_dict(as_series=False) == whole

    of_set = pa.ipc.open_file(pa.memory_map(str(columns))).read_all()  # noqa: F841  # DuckDB finds it by its name
    (row,) = duckdb.sql("SELECT sum(positions), min(min_coverage) FROM of_set").fetchall()
    assert row == (sum(whole["positions"]), pytest.approx(min(whole["min_coverage"])))

    cache = str(folder.parent / "datasets")
    loaded = datasets.load_dataset("arrow", data_files=str(folder / "train-1.arrow"), split="train", cache_dir=cache)
    assert loaded["entries"] == truth["entries"][3:6]
    assert loaded[1]["prompt_ids"] == train[4].prompt_ids_P.tolist()


def test_an_export_that_was_stopped_goes_on(exported: tuple[ShardSet, Path], tmp_path: Path) -> None:
    shards, _ = exported
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parquet(shards.storage, tmp_path, progress=stop)
    assert told == [(1, 8), (4, 8)]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(before) == ["dev-0.parquet", "train-0.parquet"]
    assert export_parquet(shards.storage, tmp_path).written == 2
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()


def test_a_damaged_shard_leaves_no_file_and_another_set_is_not_overwritten(
    folder: Path, contract: Contract, written: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("target")
    export_parquet(folder, target)
    other = tmp_path_factory.mktemp("other")
    begin(other, contract)
    seal(other, contract, [write_shard(other, "train-0", "train", contract, written[3:4])])
    with pytest.raises(InvalidRequest, match=r"train-0\.parquet comes from another shard"):
        export_parquet(other, target)

    (target / "train-1.parquet").unlink()
    data = bytearray((folder / "train-1.arrow").read_bytes())
    data[data.index(written[4].prompt_ids_P.tobytes())] ^= 1
    (folder / "train-1.arrow").write_bytes(data)
    with pytest.raises(Corrupt, match="record 1"):
        export_parquet(folder, target)
    assert not list(target.glob("*train-1*"))
    assert read_manifest(folder).totals()["shards"] == 4
