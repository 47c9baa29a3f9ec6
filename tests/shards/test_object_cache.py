"""Copies of remote files: fetched once, checked, bounded, the least recently used first to go."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shards import durable, object_cache
from shards.durable import remove_abandoned
from shards.errors import Corrupt, StorageFailed
from shards.object_cache import ObjectCache

KIB = 1 << 10


class Remote:
    """Files of 1 KiB somewhere else, told apart by a number; counts what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def content(self, number: int) -> bytes:
        return bytes([number]) * KIB

    def sha256(self, number: int) -> str:
        return hashlib.sha256(self.content(number)).hexdigest()

    def path(self, cache: ObjectCache, number: int, *, content: bytes | None = None) -> Path:
        def fetch(target: Path) -> None:
            self.fetched.append(number)
            target.write_bytes(self.content(number) if content is None else content)

        return cache.path(self.sha256(number), KIB, fetch, called=f"remote/{number}")


@pytest.fixture
def remote() -> Remote:
    return Remote()


def held(cache: ObjectCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}


def test_a_file_is_fetched_once(tmp_path: Path, remote: Remote) -> None:
    cache = ObjectCache(tmp_path, limit=10 * KIB)
    paths = {remote.path(cache, 1), remote.path(cache, 1), remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1)}
    (path,) = paths
    assert path.read_bytes() == remote.content(1)
    assert remote.fetched == [1]


def test_the_least_recently_used_goes_first_and_the_limit_holds(tmp_path: Path, remote: Remote) -> None:
    cache = ObjectCache(tmp_path, limit=3 * KIB)
    for number in (1, 2, 3):
        path = remote.path(cache, number)
        os.utime(path, ns=(number, number))  # the clock of a file system may be too coarse to tell them apart
    os.utime(remote.path(cache, 1), ns=(4, 4))
    first = (cache.folder / remote.sha256(2)).open("rb")
    remote.path(cache, 5)
    assert held(cache) == {remote.sha256(number) for number in (1, 3, 5)}
    assert first.read() == remote.content(2), "who has it open reads on"
    first.close()
    remote.path(cache, 2)
    assert len(held(cache)) == 3
    assert remote.fetched == [1, 2, 3, 5, 2]


def test_what_is_asked_for_is_served_beyond_the_limit(tmp_path: Path, remote: Remote) -> None:
    cache = ObjectCache(tmp_path, limit=1)
    for number in (1, 2):
        assert remote.path(cache, number).read_bytes() == remote.content(number)
    assert held(cache) == {remote.sha256(2)}


def test_a_copy_that_was_damaged_here_is_fetched_anew(tmp_path: Path, remote: Remote) -> None:
    remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1).write_bytes(b"\0" * KIB)
    assert remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1).read_bytes() == remote.content(1)
    assert remote.fetched == [1, 1]


def test_a_folder_of_names_follows_a_copy_that_is_fetched_anew(tmp_path: Path, remote: Remote) -> None:
    names = []
    for _ in range(2):
        cache = ObjectCache(tmp_path, limit=10 * KIB)
        path = remote.path(cache, 1)
        folder = cache.folder_of({"tokenizer.json": path})
        assert (folder / "tokenizer.json").read_bytes() == remote.content(1)
        names.append([path.name for path in folder.iterdir()])
        path.write_bytes(b"\0" * KIB)
    assert names == [["tokenizer.json"]] * 2
    assert remote.fetched == [1, 1]


@pytest.mark.parametrize("content", [b"", b"\0" * KIB, b"\1" * (KIB - 1)])
def test_what_arrives_damaged_is_refused_and_not_kept(tmp_path: Path, remote: Remote, content: bytes) -> None:
    cache = ObjectCache(tmp_path, limit=10 * KIB)
    with pytest.raises(Corrupt, match=f"remote/1 arrived as {len(content)} bytes") as caught:
        remote.path(cache, 1, content=content)
    assert "verify-shards --quarantine" in caught.value.hint
    assert held(cache) == set()
    assert remote.path(cache, 1).read_bytes() == remote.content(1)


def test_a_copy_that_another_process_removes_while_it_is_checked_is_fetched_anew(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1), object_cache.file_sha256

    def slow(path: Path) -> str:
        found = sha256(path)
        if remote.fetched == [1]:
            path.unlink()
        return found

    monkeypatch.setattr(object_cache, "file_sha256", slow)
    assert remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1).read_bytes() == remote.content(1)
    assert remote.fetched == [1, 1]
    assert path.exists()


def test_a_copy_counts_as_used_from_before_it_is_checked(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another process would take it for the least recently used."""
    os.utime(remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1), ns=(1, 1))
    used: list[int] = []
    sha256 = object_cache.file_sha256
    monkeypatch.setattr(object_cache, "file_sha256", lambda path: used.append(path.stat().st_mtime_ns) or sha256(path))
    remote.path(ObjectCache(tmp_path, limit=10 * KIB), 1)
    assert used > [1]


def test_what_arrives_is_never_taken_for_abandoned(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where another process looked between the creation of its file and the lock."""
    flock, removed = durable.fcntl.flock, list[list[str]]()

    def slow(file: Any, operation: int) -> None:
        if operation & durable.fcntl.LOCK_NB and not removed:
            removed.append([])
            removed[0] = remove_abandoned(tmp_path)
        flock(file, operation)

    def fetch(target: Path) -> None:
        target.write_bytes(remote.content(1))
        removed.append(remove_abandoned(tmp_path))

    monkeypatch.setattr(durable.fcntl, "flock", slow)
    ObjectCache(tmp_path, limit=10 * KIB).path(remote.sha256(1), KIB, fetch, called="remote/1")
    assert [len(names) for names in removed] == [1, 0]


def test_a_full_disk_is_made_room_on_below_the_limit(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of three files."""
    cache = ObjectCache(tmp_path, limit=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(3 - len(held(cache))) * KIB))
    for number in (1, 2, 3):
        os.utime(remote.path(cache, number), ns=(number, number))
    remote.path(cache, 4)
    assert held(cache) == {remote.sha256(number) for number in (2, 3, 4)}


def test_threads_fetch_one_file_once_and_two_files_at_once(tmp_path: Path, remote: Remote) -> None:
    cache, meeting = ObjectCache(tmp_path, limit=10 * KIB), threading.Barrier(2, timeout=20)
    assert remote.sha256(1)[:2] != remote.sha256(2)[:2]
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        def fetch(target: Path) -> None:
            meeting.wait()
            remote.fetched.append(number)
            target.write_bytes(remote.content(number))

        try:
            cache.path(remote.sha256(number), KIB, fetch, called="remote")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 1, 2, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(remote.fetched) == [1, 2]


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(
    tmp_path: Path, remote: Remote, in_child: Callable[[Callable[[], None]], int]
) -> None:
    cache = ObjectCache(tmp_path, limit=10 * KIB)

    def killed(target: Path) -> None:
        target.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    died_of = in_child(lambda: cache.path(remote.sha256(1), KIB, killed, called="remote") and None)
    assert died_of == signal.SIGKILL
    assert list(tmp_path.glob(".*.tmp"))
    assert remote.path(cache, 1).read_bytes() == remote.content(1)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, remote: Remote) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match="the shard cache") as caught:
        remote.path(ObjectCache(tmp_path / "file" / "cache", limit=KIB), 1)
    assert "MINICODFORMER_CACHE" in caught.value.hint
    assert "MINICODFORMER_SHARD_CACHE_GB" in caught.value.hint


def test_folder_and_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICODFORMER_CACHE", str(tmp_path))
    monkeypatch.setenv("MINICODFORMER_SHARD_CACHE_GB", "0.5")
    assert (ObjectCache().folder, ObjectCache().limit) == (tmp_path / "shards", 1 << 29)
    for senseless in ("plenty", "inf", "nan", "0", "-1"):
        monkeypatch.setenv("MINICODFORMER_SHARD_CACHE_GB", senseless)
        with pytest.raises(StorageFailed, match=f"must be a number of GiB above 0, not '{senseless}'") as caught:
            ObjectCache()
        assert "above the size of the set" in caught.value.hint
