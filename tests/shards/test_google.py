"""A set under gs://: Google's own client against a server on loopback. What is not tested here: their credentials."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.contract import Contract
from shards.errors import ContractMismatch, Corrupt, Incomplete, StorageFailed
from shards.manifest import begin, is_sealed, read_manifest
from shards.merge import copy_set
from shards.object_cache import ObjectCache
from shards.reader import ShardSet
from shards.record import Record
from shards.storage import storage_at
from shards.units import published_units
from shards.verify import quarantine, verify_shards
from shards.writer import write_shard
from tests.shards.object_store import TEACHER, UNITS, GoogleStore, fill, serving_google


@pytest.fixture(scope="module")
def store() -> Iterator[GoogleStore]:
    with serving_google() as store:
        yield store


@pytest.fixture
def url(store: GoogleStore) -> str:
    return store.new_url()


def test_a_set_reads_as_the_same_set_in_a_folder(
    tmp_path: Path,
    url: str,
    cache: ObjectCache,
    contract: Contract,
    records: list[Record],
    same: Callable[[Record, Record], None],
) -> None:
    made = fill(url, contract, records)
    fill(tmp_path / "here", contract, records)
    here, there = ShardSet(tmp_path / "here"), ShardSet(storage_at(url, cache=cache))
    assert there.manifest == made
    for name in ("dev", "train"):
        for left, right in zip(here.split(name), there.split(name), strict=True):
            same(left, right)
    assert {path.name: path.read_bytes() for path in there.teacher_folder.iterdir()} == TEACHER
    assert verify_shards(there.storage).intact
    assert copy_set(storage_at(url, cache=cache), tmp_path / "down") == read_manifest(tmp_path / "here")


def test_an_unfinished_set_is_none_and_goes_on(
    store: GoogleStore, url: str, contract: Contract, records: list[Record]
) -> None:
    begin(url, contract)
    first = write_shard(url, UNITS[0], "dev", contract, records[:1])
    assert not is_sealed(url)
    with pytest.raises(Incomplete, match=r"gs://.*manifest.json"):
        read_manifest(url)
    with pytest.raises(ContractMismatch, match="engine"):
        begin(url, dataclasses.replace(contract, engine="another"))
    assert write_shard(url, UNITS[0], "dev", contract, records[1:2]) == first, "the first published counts"
    assert fill(url, contract, records).shards[0] == first
    assert len([name for name in store.files(url) if name.startswith("dev-00000")]) == 1


def test_damage_is_found_named_and_set_aside(
    store: GoogleStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record]
) -> None:
    manifest = fill(url, contract, records)
    damaged = manifest.shards[1].name
    store.overwrite(url, damaged, store.files(url)[damaged][:-1] + b"?")
    with pytest.raises(Corrupt, match=damaged):
        ShardSet(storage_at(url, cache=cache)).split("train")[0]
    report = verify_shards(storage_at(url, cache=cache))
    assert list(report.damage) == [damaged]
    quarantine(url, report)
    assert f"quarantine/{damaged}" in store.files(url)
    assert sorted(published_units(storage_at(url))) == ["dev-00000", "train-00001"]
    assert fill(url, contract, records) == manifest
    assert verify_shards(storage_at(url, cache=cache)).intact


def test_a_bucket_that_is_not_there_is_named(url: str, contract: Contract) -> None:
    with pytest.raises(StorageFailed, match="no-such-bucket") as caught:
        begin(url.replace("@bucket-", "@no-such-bucket-"), contract)
    assert "credentials" in caught.value.hint
