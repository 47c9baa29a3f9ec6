"""A set against its manifest: all damage is named; what is set aside leaves a set that stage one can finish."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, StorageFailed, Truncated, UnknownVersion
from shards.manifest import begin, read_manifest, seal
from shards.record import Record
from shards.sealed_json import sealed
from shards.storage import LocalStorage
from shards.units import describe, published_positions, published_units
from shards.verify import quarantine, verify_shards
from shards.writer import build_shard, write_shard


def swap_shard(folder: Path, contract: Contract, written: list[Record]) -> None:
    """A whole shard of the same size and shape, but not the one that the manifest names."""
    renamed = [dataclasses.replace(record, sample_id=record.sample_id.upper()) for record in written[:3]]
    (folder / "train-0.arrow").write_bytes(build_shard("train-0", "train", contract, renamed))


def flip_cell(folder: Path, contract: Contract, written: list[Record]) -> None:
    path = folder / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(written[4].prompt_ids_P.tobytes())] ^= 1
    path.write_bytes(data)


def flip_version(folder: Path, contract: Contract, written: list[Record]) -> None:
    """Where it is read: in the footer. The bit makes it a version that no reader knows yet."""
    path = folder / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"format_version":') + len(b'"format_version":')] ^= 1
    path.write_bytes(data)


def remove_shard(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "dev-0.arrow").unlink()


def edit_teacher_file(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "teacher" / "tokenizer.json").write_text("[]")


def edit_columns(folder: Path, contract: Contract, written: list[Record]) -> None:
    (path,) = (folder / "columns").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_contract(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "contract.json").unlink()


def cut_manifest(folder: Path, contract: Contract, written: list[Record]) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (swap_shard, "train-0.arrow", "not the one of manifest.json"),
        (flip_cell, "train-1.arrow", "record 1: prompt_ids differs"),
        (flip_version, "train-1.arrow", "differ from its seal"),
        (remove_shard, "dev-0.arrow", "cannot be opened"),
        (edit_teacher_file, "teacher/tokenizer.json", "differs from manifest.json"),
        (edit_columns, "columns/", "differs from manifest.json"),
        (remove_contract, "contract.json", "cannot be opened"),
        (cut_manifest, "manifest.json", "ends after"),
    ],
)
def test_R1_verify_names_what_is_damaged_and_how(
    folder: Path, contract: Contract, written: list[Record], damage: Any, name: str, said: str
) -> None:
    assert verify_shards(folder).intact
    damage(folder, contract, written)
    report = verify_shards(folder)
    assert not report.intact
    (damaged,) = report.damage
    assert damaged.startswith(name)
    assert said in report.damage[damaged]


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


@pytest.mark.parametrize("refusal", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    digest = hashlib.file_digest

    def refuse(file: Any, *rest: Any) -> Any:
        if file.name.endswith("train-1.arrow"):
            raise OSError(refusal, os.strerror(refusal))
        return digest(file, *rest)

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(StorageFailed, match=rf"train-1\.arrow cannot be read: {os.strerror(refusal)}"):
        verify_shards(folder)

    def refuse_all(path: Path) -> bytes:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(Path, "read_bytes", refuse_all)
    with pytest.raises(StorageFailed, match=r"manifest\.json cannot be read"):
        read_manifest(folder)


def test_what_a_newer_version_wrote_is_not_called_damaged(folder: Path) -> None:
    path = folder / "contract.json"
    document = {"contract": json.loads(path.read_bytes())["contract"] | {"format_version": 99}}
    path.write_bytes(sealed(document))
    with pytest.raises(UnknownVersion, match="format version 99"):
        verify_shards(folder)


def test_quarantine_of_files_whose_folder_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "columns")
    shutil.rmtree(folder / "teacher")
    report = verify_shards(folder)
    assert len(report.damage) == 2
    quarantine(folder, report)
    assert [path.name for path in (folder / "quarantine").iterdir()] == ["manifest.json"]


def test_quarantine_leaves_a_set_that_lacks_only_what_was_damaged(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    before, shards = read_manifest(folder), {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
    flip_cell(folder, contract, written)
    edit_columns(folder, contract, written)
    remove_contract(folder, contract, written)
    damaged = (folder / "train-1.arrow").read_bytes()
    quarantine(folder, verify_shards(folder))
    assert (folder / "quarantine" / "train-1.arrow").read_bytes() == damaged
    with pytest.raises(Incomplete):
        read_manifest(folder)
    storage = LocalStorage(folder)
    begin(storage, contract)
    assert sorted(published_units(storage)) == ["dev-0", "train-0", "train-2"]
    write_shard(storage, "train-1", "train", contract, written[3:6])
    infos = [describe(storage, name, contract).info for name in published_units(storage).values()]
    assert seal(storage, contract, infos) == before
    assert {path.name: path.read_bytes() for path in folder.glob("*.arrow")} == shards
    assert verify_shards(folder).intact


def test_a_damaged_manifest_is_set_aside_and_made_again(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    before = read_manifest(folder)
    cut_manifest(folder, contract, written)
    quarantine(folder, verify_shards(folder))
    storage = LocalStorage(folder)
    infos = [describe(storage, name, contract).info for name in published_units(storage).values()]
    assert seal(storage, contract, infos) == before


def test_a_shard_damaged_before_the_seal_is_not_adopted(
    folder: Path, contract: Contract, written: list[Record]
) -> None:
    """Otherwise the manifest would vouch for it."""
    flip_cell(folder, contract, written)
    with pytest.raises(Corrupt, match="record 1: prompt_ids differs") as caught:
        describe(LocalStorage(folder), "train-1.arrow", contract)
    assert "delete it and run the same command again" in caught.value.hint


def test_counting_what_is_there_before_the_seal_names_a_shard_that_is_cut_and_how_to_remake_it(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    path = folder / "train-1.arrow"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Truncated, match=r"train-1\.arrow") as caught:
        published_positions(LocalStorage(folder))
    assert "delete it and run the same command again" in caught.value.hint
