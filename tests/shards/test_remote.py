"""A set in an object store: a real S3 client against a real server on loopback."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.contract import Contract, Selection
from shards.errors import ContractMismatch, Corrupt, Incomplete, StorageFailed
from shards.inspect import inspect
from shards.manifest import begin, is_sealed, publish_teacher_files, read_manifest, seal
from shards.merge import copy_set
from shards.object_cache import ObjectCache
from shards.reader import ShardSet
from shards.record import Record
from shards.remote import RemoteStorage
from shards.schema import STATISTICS
from shards.storage import storage_at
from shards.units import published_units
from shards.verify import quarantine, verify_shards
from shards.writer import build_shard, write_shard
from tests.shards.object_store import TEACHER, UNITS, ObjectStore, fill
from tests.shards.whole import SELECTIONS, contract_of, learnt, record_of


def open_at(url: str, cache: ObjectCache) -> RemoteStorage:
    storage = storage_at(url, cache=cache)
    assert isinstance(storage, RemoteStorage)
    return storage


def test_a_set_in_a_store_reads_as_the_same_set_in_a_folder(
    tmp_path: Path,
    url: str,
    cache: ObjectCache,
    contract: Contract,
    records: list[Record],
    same: Callable[[Record, Record], None],
) -> None:
    fill(tmp_path / "here", contract, records)
    made = fill(url, contract, records)
    here, there = ShardSet(tmp_path / "here"), ShardSet(storage_at(url, cache=cache))
    assert there.manifest == made
    assert there.contract == here.contract
    assert there.splits == here.splits == ("dev", "train")
    for name in there.splits:
        ours, theirs = here.split(name), there.split(name)
        assert theirs.sample_ids.tolist() == ours.sample_ids.tolist()
        assert theirs.column("entries").tolist() == ours.column("entries").tolist()
        for left, right in zip(ours, theirs, strict=True):
            same(left, right)
    assert {path.name: path.read_bytes() for path in there.teacher_folder.iterdir()} == TEACHER
    assert verify_shards(there.storage).intact


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: f"{selection.kind}, {selection.tail_known}")
def test_a_set_of_any_selection_goes_into_a_store_whatever_it_does_not_know(
    tmp_path: Path, url: str, cache: ObjectCache, selection: Selection
) -> None:
    rng, contract = np.random.default_rng(0), contract_of(selection)
    records = [record_of(contract, rng, name=name) for name in "abc"]
    contract, tables = learnt(contract, records)
    for place in (tmp_path, url):
        begin(place, contract)
        written = write_shard(place, "train-00000", "train", contract, records, tables=tables)
        assert write_shard(place, "train-00000", "train", contract, records, tables=tables) == written
        seal(place, contract, [written])
    here, there = ShardSet(tmp_path).split("train"), ShardSet(storage_at(url, cache=cache)).split("train")
    for name in STATISTICS:
        np.testing.assert_array_equal(there.column(name), here.column(name), strict=True)


def test_objects_are_named_by_their_content_and_the_manifest_is_the_commit(
    store: ObjectStore, url: str, contract: Contract, records: list[Record]
) -> None:
    begin(url, contract)
    infos = [write_shard(url, unit, "train", contract, [record]) for unit, record in zip(UNITS, records, strict=True)]
    assert not is_sealed(url)
    with pytest.raises(Incomplete, match=r"s3://.*manifest.json") as caught:
        read_manifest(url)
    assert "goes on" in caught.value.hint

    manifest = seal(url, contract, infos, teacher_folder=publish_teacher_files(url, TEACHER))
    assert is_sealed(url)
    for unit, record, info in zip(UNITS, records, manifest.shards, strict=True):
        assert info.name == f"{unit}-{info.sha256}.arrow"
        assert store.files(url)[info.name] == build_shard(unit, "train", contract, [record])
    assert seal(url, contract, infos, teacher_folder=manifest.teacher_folder) == manifest, "sealing can be repeated"
    with pytest.raises(ContractMismatch, match="other contents"):
        seal(url, contract, infos[:2], teacher_folder=manifest.teacher_folder)


def test_objects_copied_into_a_folder_as_they_are_read_there(
    tmp_path: Path, store: ObjectStore, url: str, contract: Contract, records: list[Record]
) -> None:
    manifest = fill(url, contract, records)
    for name, data in store.files(url).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    copy = ShardSet(tmp_path)
    assert verify_shards(copy.storage).intact
    assert copy.manifest == manifest
    assert {path.name for path in copy.teacher_folder.iterdir()} == set(TEACHER)


def test_a_copy_goes_up_and_down_and_on_where_it_stopped(
    tmp_path: Path, store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record]
) -> None:
    made = fill(tmp_path / "here", contract, records)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_set(tmp_path / "here", url, progress=stop)
    store.refuse()
    up = copy_set(tmp_path / "here", storage_at(url, cache=cache))
    put = [asked for asked in store.requests() if asked.startswith("PUT") and asked.endswith(".arrow")]
    assert len([asked for asked in put if "/columns/" not in asked]) == 1, "two of three were there"
    assert [info.sha256 for info in up.shards] == [info.sha256 for info in made.shards]
    assert copy_set(storage_at(url, cache=cache), tmp_path / "back") == made
    assert visible(tmp_path / "back") == visible(tmp_path / "here")
    fill(tmp_path / "other", dataclasses.replace(contract, engine="another"), records)
    with pytest.raises(ContractMismatch, match="engine"):
        copy_set(tmp_path / "other", url)


def visible(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_opening_a_split_fetches_no_shard(
    store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record]
) -> None:
    fill(url, contract, records)
    store.refuse()
    shards = ShardSet(storage_at(url, cache=cache))
    assert shards.split("train").response_lengths.tolist() == [len(record.response_ids_R) for record in records[1:]]
    assert not [asked for asked in store.requests() if asked.endswith(".arrow") and "columns" not in asked]
    assert shards.split("dev")[0].sample_id == records[0].sample_id
    assert [asked for asked in store.requests() if "dev-00000" in asked]


def test_W3_the_first_published_shard_of_a_unit_counts_for_every_writer(
    store: ObjectStore, url: str, contract: Contract, records: list[Record]
) -> None:
    storage = storage_at(url)
    begin(storage, contract)
    first = write_shard(storage, "train-00000", "train", contract, records[:1])
    assert write_shard(storage, "train-00000", "train", contract, records[1:]) == first
    assert published_units(storage) == {"train-00000": first.name}
    assert [name for name in store.files(url) if name.endswith(".arrow")] == [first.name]


def test_W3_writers_at_once_agree_on_one_set(
    store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, make_record: Callable[..., Record]
) -> None:
    """Each with signals of its own, as from engines that differ in the last bit: the set is one writer's or another's,
    unit by unit, and whole."""
    units, sealed_as, start = [f"train-{unit:05d}" for unit in range(4)], [], threading.Barrier(3)

    def write(writer: int) -> None:
        storage = storage_at(url)
        start.wait()
        begin(storage, contract)
        infos = []
        for number, unit in enumerate(units[writer:] + units[:writer]):
            record = dataclasses.replace(make_record(contract, 100 * writer + number), sample_id=unit)
            infos.append(write_shard(storage, unit, "train", contract, [record]))
        folder = publish_teacher_files(storage, {"head.bin": bytes([writer])})
        sealed_as.append(seal(storage, contract, infos, teacher_folder=folder))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = ShardSet(storage_at(url, cache=cache))
    assert verify_shards(shards.storage).intact
    assert shards.manifest in sealed_as
    assert sorted(shards.split("train").sample_ids.tolist()) == units


def test_W6_resuming_under_another_contract_is_refused_in_a_store_too(
    url: str, contract: Contract, records: list[Record]
) -> None:
    begin(url, contract)
    with pytest.raises(ContractMismatch, match=r"engine is 'synthetic 1' there, 'another' here"):
        begin(url, dataclasses.replace(contract, engine="another"))


def test_R1_a_damaged_object_is_found_and_named(
    store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record]
) -> None:
    manifest = fill(url, contract, records)
    damaged = manifest.shards[1].name
    content = bytearray(store.files(url)[damaged])
    content[len(content) // 2] ^= 1
    store.overwrite(url, damaged, bytes(content))
    shards = ShardSet(storage_at(url, cache=cache))
    assert shards.split("dev")[0].sample_id == records[0].sample_id
    with pytest.raises(Corrupt, match=damaged):
        shards.split("train")[0]
    assert not list(cache.folder.glob("*.tmp")), "what arrived damaged is not kept"


def test_quarantine_in_a_store_leaves_a_set_that_lacks_only_what_was_damaged(
    store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record]
) -> None:
    manifest = fill(url, contract, records)
    damaged = manifest.shards[1].name
    storage = storage_at(url, cache=cache)
    assert ShardSet(storage).split("train")[0].sample_id == records[1].sample_id, "a good copy is here"
    store.overwrite(url, damaged, store.files(url)[damaged][:-1])
    report = verify_shards(storage)
    assert list(report.damage) == [damaged], "a good copy here does not hide what lies there"
    quarantine(url, report)
    assert f"quarantine/{damaged}" in store.files(url)
    assert sorted(published_units(storage_at(url))) == ["dev-00000", "train-00001"]
    assert fill(url, contract, records) == manifest
    assert verify_shards(storage_at(url, cache=cache)).intact


def test_inspection_of_a_url_fetches_what_it_shows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: ObjectStore,
    url: str,
    contract: Contract,
    records: list[Record],
) -> None:
    monkeypatch.setenv("MINICODFORMER_CACHE", str(tmp_path))
    manifest = fill(url, contract, records)
    base, options = url.split("?")
    name = manifest.shards[2].name
    facts = inspect(f"{base}/{name}?{options}")
    assert (facts.where, facts.records, facts.checksum.intact) == (f"{base}/{name}", 1, True)
    store.refuse()
    facts = inspect(url)
    assert (facts.records, facts.positions) == (3, manifest.totals()["positions"])
    assert not [asked for asked in store.requests() if "train-00001" in asked]


def test_a_store_that_cannot_be_reached_is_named(url: str, contract: Contract) -> None:
    with pytest.raises(StorageFailed, match="no-such-bucket") as caught:
        begin(url.replace("bucket-", "no-such-bucket-"), contract)
    assert "credentials" in caught.value.hint


def test_keys_in_a_url_are_used_and_never_shown(url: str, contract: Contract) -> None:
    storage = storage_at(url.replace("s3://", "s3://somebody:hidden@"))
    begin(storage, contract)
    assert storage.where("contract.json") == f"{url.split('?')[0]}/contract.json"
    with pytest.raises(StorageFailed) as caught:
        begin(url.replace("s3://", "s3://somebody:hidden@no-such-"), contract)
    assert "hidden" not in str(caught.value)


def test_another_kind_of_url_is_refused(contract: Contract) -> None:
    with pytest.raises(ValueError, match="s3:// or gs://"):
        begin("ftp://somewhere/shards", contract)


@pytest.mark.parametrize("left", [0, 100])
def test_a_unit_whose_object_is_lost_is_not_sealed_and_the_hint_brings_it_back(
    store: ObjectStore, url: str, contract: Contract, records: list[Record], left: int
) -> None:
    manifest = fill(url, contract, records)
    lost, whole = manifest.shards[1], store.files(url)
    store.delete(url, "manifest.json")
    store.delete(url, lost.name)
    if left:
        store.overwrite(url, lost.name, whole[lost.name][:left])
    with pytest.raises(Incomplete, match=rf"{lost.name} has {left} of {lost.bytes} bytes") as caught:
        fill(url, contract, records)
    assert not is_sealed(url)
    document = f"units/{lost.name.removesuffix('.arrow')}.json"
    assert caught.value.hint.startswith(f"delete {url.split('?')[0]}/{document} and run the same command again")
    store.delete(url, document)
    assert fill(url, contract, records) == manifest
    assert {name: data for name, data in store.files(url).items() if "quarantine" not in name} == whole


def test_a_forged_unit_document_is_refused(
    store: ObjectStore, url: str, contract: Contract, records: list[Record]
) -> None:
    begin(url, contract)
    info = write_shard(url, "train-00000", "train", contract, records[:1])
    name = f"units/train-00000-{info.sha256}.json"
    document = json.loads(store.files(url)[name])
    document["shard"]["positions"] += 1
    store.overwrite(url, name, json.dumps(document, sort_keys=True, indent=1).encode() + b"\n")
    with pytest.raises(Corrupt, match="seal"):
        write_shard(url, "train-00000", "train", contract, records[:1])
