"""DistillKit's Parquet, written by its own code (golden/distillkit, at commit a61c2e7), is read as it reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import cli
from shards.contract import Selection
from shards.manifest import Manifest
from shards.reader import ShardSet
from shards.verify import verify_shards
from stages.errors import StageError
from stages.teacher_cache import dumps
from stages.teacher_cache.distillkit import COLUMNS, CONFIG_FILE, read_layout, read_row
from stages.teacher_cache.dumps import import_dump
from tests.shards.whole import contract_of

GOLDEN = Path(__file__).parent / "golden" / "distillkit"
LAYOUTS = sorted(path.name for path in GOLDEN.iterdir())
NO_PAD = -1


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / "data_0.parquet").to_pylist())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the second row of a copy of a golden folder."""
    rows = rows_of(folder)
    change(rows[1])
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet")


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "recommended", tmp_path / "dump"))


def bring(dump: Path, target: Path, teacher: Path, *, k: int = 8) -> Manifest:
    return import_dump(dump, target, teacher="a/teacher", teacher_folder=teacher, k=k, pca_width=6, thinking=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_are_what_their_own_code_makes_of_them(name: str) -> None:
    layout = read_layout(GOLDEN / name)
    with np.load(GOLDEN / name / "truth.npz") as truth:
        for number, found in enumerate(rows_of(GOLDEN / name)):
            row = read_row(found, layout, pad_id=NO_PAD)
            assert [*row.prompt_ids_P, *row.response_ids_R] == found["input_ids"]
            assert len(row.prompt_ids_P) == 1
            theirs_NK = truth[f"logprobs_{number}"]
            scaled_NK = theirs_NK - np.logaddexp.reduce(theirs_NK, axis=1, keepdims=True).clip(min=0)
            for n, ids_K in enumerate(truth[f"ids_{number}"]):
                expected = dict(zip(ids_K.tolist(), scaled_NK[n].tolist(), strict=True))
                assert len(expected) == layout.k
                # Theirs come out in the precision of the exact values, ours do not lose that once more.
                for id_, logprob in zip(row.ids_NK[n].tolist(), row.logprobs_NK[n].tolist(), strict=True):
                    assert logprob == pytest.approx(expected[id_], rel=2**-8 if name == "residuals" else 2e-6, abs=1e-5)
            assert (np.diff(row.logprobs_NK, axis=1) <= 0).all()


def test_a_folder_becomes_a_set_that_says_what_it_does_not_know(
    tmp_path: Path, dump: Path, dumped_teacher: Path
) -> None:
    manifest = bring(dump, tmp_path / "set", dumped_teacher)
    assert (manifest.contract.selection.k, manifest.contract.selection.tail_known) == (8, False)
    assert verify_shards(tmp_path / "set").intact
    shards, layout = ShardSet(tmp_path / "set"), read_layout(dump)
    records = {record.sample_id: record for name in shards.splits for record in shards.split(name)}
    assert sorted(records) == ["data_0-0", "data_0-1", "data_0-2"]
    for number, found in enumerate(rows_of(dump)):
        record, row = records[f"data_0-{number}"], read_row(found, layout, pad_id=NO_PAD)
        assert record.response_ids_R.tolist() == found["input_ids"][1:]
        assert np.isnan(record.log_tail_N).all()
        assert record.logprobs_NK is not None
        for n in range(record.positions):
            truth = dict(zip(row.ids_NK[n, :8].tolist(), row.logprobs_NK[n, :8].tolist(), strict=True))
            assert set(record.ids_NK[n].tolist()) == set(truth)
            for id_, logprob in zip(record.ids_NK[n].tolist(), record.logprobs_NK[n].tolist(), strict=True):
                assert np.exp(logprob) == pytest.approx(np.exp(truth[id_]), abs=0.02)
    assert bring(dump, tmp_path / "set", dumped_teacher) == manifest


def test_labels_say_what_the_prompt_is_and_padding_is_left_out() -> None:
    layout, found = read_layout(GOLDEN / "recommended"), rows_of(GOLDEN / "recommended")[0]
    whole = read_row(found, layout, pad_id=NO_PAD)
    row = read_row(found | {"labels": [-100] * 4 + found["input_ids"][4:]}, layout, pad_id=found["input_ids"][-1])
    assert row.prompt_ids_P.tolist() == found["input_ids"][:4]
    assert row.response_ids_R.tolist() == found["input_ids"][4:-1]
    assert row.ids_NK.tolist() == whole.ids_NK[3:-1].tolist()


def test_responses_to_one_prompt_are_in_one_split(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a prompt at all."""
    rows = rows_of(dump)
    monkeypatch.setattr(dumps, "_ONE_IN", 2)

    def splits(prompt: int) -> set[str]:
        def labelled(found: dict[str, Any], last: int) -> dict[str, Any]:
            tokens = [*rows[0]["input_ids"][:prompt], *found["input_ids"][prompt:-1], last]
            return found | {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}

        answers = [labelled(found, last) for found in rows for last in range(20)]
        pq.write_table(pa.Table.from_pylist(answers), dump / "data_0.parquet")
        contract = contract_of(Selection(kind="topk", k=8, tail_known=False), start_token_id=299)
        return {split for split, _, _ in dumps.read_parquet(dump, contract)}

    assert len(splits(4)) == 1
    assert splits(1) == {"train", "dev"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.update({name: [] for name in COLUMNS}), "there are no tokens"),
        (lambda row: row["bytepacked_indices"].pop(), "12 tokens, 11 and 10 positions"),
        (lambda row: row["input_ids"].__setitem__(3, 300), "300"),
        (lambda row: row.update(compressed_logprobs=[each[:-1] for each in row["compressed_logprobs"]]), "31 bytes"),
        (lambda row: row.update(bytepacked_indices=[each[:1] for each in row["bytepacked_indices"]]), "1 bytes"),
        (lambda row: row.update(bytepacked_indices=[[0] * 18 for _ in row["bytepacked_indices"]]), "repeats an id"),
        (lambda row: row.update(compressed_logprobs=[[255] * 32 for _ in row["compressed_logprobs"]]), "not finite"),
    ],
)
def test_a_row_that_is_none_is_named(
    tmp_path: Path, dump: Path, dumped_teacher: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    rewrite(dump, change)
    with pytest.raises(StageError, match=f"data_0.parquet, row 1: .*{said}"):
        bring(dump, tmp_path / "set", dumped_teacher)
    assert not list(tmp_path.glob("set/*.arrow"))


def test_what_is_no_such_folder_is_refused(tmp_path: Path, dump: Path, dumped_teacher: Path) -> None:
    with pytest.raises(StageError, match="16 ids a position, not 17"):
        bring(dump, tmp_path / "set", dumped_teacher, k=17)
    packed = rows_of(dump)[0] | {"attention_mask": [1] * 5 + [2] * 4}
    with pytest.raises(ValueError, match="packed"):
        read_row(packed, read_layout(dump), pad_id=NO_PAD)
    said = yaml.safe_load((dump / CONFIG_FILE).read_text())
    for wrong in ({"k": 2}, {"exact_dtype": "int3"}, {"polynomial_terms": ["log"]}):
        (dump / CONFIG_FILE).write_text(yaml.safe_dump(said | wrong))
        with pytest.raises(StageError, match="does not say how"):
            bring(dump, tmp_path / "set", dumped_teacher)
    (dump / CONFIG_FILE).unlink()
    with pytest.raises(StageError, match=CONFIG_FILE):
        bring(dump, tmp_path / "set", dumped_teacher)
    (dump / "data_0.parquet").rename(dump / "data_0.txt")
    with pytest.raises(StageError, match=r"no \.parquet"):
        bring(dump, tmp_path / "set", dumped_teacher)


def test_the_older_layout_is_refused_by_name(tmp_path: Path, dump: Path, dumped_teacher: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1]], "packed_indices": [[[1]]]}), dump / "data_0.parquet")
    with pytest.raises(StageError, match="older layout"):
        bring(dump, tmp_path / "set", dumped_teacher)


def test_a_dump_without_rows_is_refused_by_name(tmp_path: Path, dump: Path, dumped_teacher: Path) -> None:
    table = pq.read_table(dump / "data_0.parquet")
    pq.write_table(table.slice(0, 0), dump / "data_0.parquet")
    with pytest.raises(StageError, match=r"the \.parquet of .*dump holds no row"):
        bring(dump, tmp_path / "set", dumped_teacher)


def test_import_cache_on_the_command_line(tmp_path: Path, dump: Path, dumped_teacher: Path) -> None:
    words = ["import-cache", str(dump), str(tmp_path / "set"), "--teacher", str(dumped_teacher), "--k", "8"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "3 records" in done.output
    assert "the tail is not known" in done.output
