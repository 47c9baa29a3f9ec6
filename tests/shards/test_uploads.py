"""Uploads that a store refuses, that are interrupted, and that another writer overtakes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyarrow import fs

from shards.contract import Contract
from shards.errors import Incomplete, StorageFailed
from shards.manifest import is_sealed
from shards.object_cache import ObjectCache
from shards.reader import ShardSet
from shards.record import Record
from shards.remote import RemoteStorage
from shards.storage import storage_at
from tests.shards.object_store import ObjectStore, fill


class Patched:
    """A file system of which one operation is another."""

    def __init__(self, files: fs.FileSystem, open_output_stream: Callable[[str], Any]) -> None:
        self._files, self.open_output_stream = files, open_output_stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


def opened(url: str) -> tuple[RemoteStorage, Callable[[str], Any]]:
    """A store, and how it opens an upload."""
    storage = storage_at(url)
    assert isinstance(storage, RemoteStorage)
    return storage, storage._files.open_output_stream


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.long)])
def test_W5_a_refusal_of_any_request_is_explained_and_resumable(
    store: ObjectStore, url: str, cache: ObjectCache, contract: Contract, records: list[Record], every: int
) -> None:
    store.refuse()
    fill(url, contract, records)
    requests, expected, silent = len(store.requests()), store.files(url), []
    for number in range(0, requests, every):
        place = store.new_url()
        store.refuse(number)
        try:
            fill(place, contract, records)
            silent.append(number)
        except StorageFailed as error:
            hint = error.hint
            assert "run the same command again" in hint
        store.refuse()
        if not is_sealed(place):
            with pytest.raises(Incomplete):
                ShardSet(storage_at(place, cache=cache))
        fill(place, contract, records)
        assert store.files(place) == expected
    assert silent == []


def test_what_another_writer_puts_under_the_same_name_stays(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store refuses no second writer. The first's upload succeeded all the same: nothing of it is to be removed."""
    storage, put = opened(url)

    @contextlib.contextmanager
    def overtaken(path: str) -> Iterator[Any]:
        with put(path) as stream:
            yield stream
        store.overwrite(url, "manifest.json", b"another's, and longer")

    monkeypatch.setattr(storage, "_files", Patched(storage._files, open_output_stream=overtaken))
    assert storage.publish("manifest.json", b"ours")
    assert store.files(url) == {"manifest.json": b"another's, and longer"}


def test_an_upload_that_is_interrupted_leaves_nothing_and_says_so(
    store: ObjectStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, put = opened(url)

    @contextlib.contextmanager
    def interrupted(path: str) -> Iterator[Any]:
        with put(path) as stream:
            stream.write(b"half")
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(storage, "_files", Patched(storage._files, open_output_stream=interrupted))
    with pytest.raises(KeyboardInterrupt):
        storage.publish("manifest.json", b"the whole of it")
    assert store.files(url) == {}
