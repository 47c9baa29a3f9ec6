"""W1, W2, W4, W5: whatever stops the writing, what is visible is whole and what was promised is there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shards import durable, manifest
from shards.contract import Contract
from shards.durable import LOCAL_DISK, Disk, publish, remove_abandoned
from shards.errors import InvalidRecord, ShardError, StorageFailed
from shards.manifest import begin, read_manifest
from shards.record import Record
from shards.storage import LocalStorage
from shards.verify import verify_shards
from shards.writer import build_shard, write_shard

UNITS = ("train-00000", "train-00001", "dev-00000")


@pytest.fixture
def write_set(contract: Contract, records: list[Record]) -> Callable[..., Iterator[str]]:
    """All of stage one that concerns files; yields each name when its publication has returned."""

    def write(folder: Path, disk: Disk) -> Iterator[str]:
        storage = LocalStorage(folder, disk=disk)
        begin(storage, contract)
        yield manifest.CONTRACT_NAME
        infos = []
        for unit, record in zip(UNITS, records, strict=True):
            infos.append(write_shard(storage, unit, unit.split("-")[0], contract, [record]))
            yield f"{unit}.arrow"
        manifest.seal(storage, contract, infos)
        yield manifest.MANIFEST_NAME

    return write


@pytest.fixture
def expected(tmp_path: Path, write_set: Callable[..., Iterator[str]]) -> dict[str, bytes]:
    """The undisturbed set."""
    names = list(write_set(tmp_path / "undisturbed", LOCAL_DISK))
    found = visible(tmp_path / "undisturbed")
    assert set(found) == {*names, *(name for name in found if name.startswith("columns/"))}
    return found


def visible(folder: Path) -> dict[str, bytes]:
    """Files under final names."""
    if not folder.exists():
        return {}
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def require_sound(folder: Path, expected: dict[str, bytes], promised: list[str]) -> None:
    """What is visible is whole, what was promised is visible, and a manifest comes with all that it lists."""
    found = visible(folder)
    assert all(found[name] == expected[name] for name in found)
    assert set(promised) <= set(found)
    assert manifest.MANIFEST_NAME not in found or found == expected


def require_resumable(folder: Path, expected: dict[str, bytes], write_set: Callable[..., Iterator[str]]) -> None:
    list(write_set(folder, LOCAL_DISK))
    assert visible(folder) == expected
    assert not list(folder.rglob(".*.tmp")), "what the dead writer left is cleared away"
    assert verify_shards(folder).intact


def operations_of(disks: dict[str, Any], folder: Path, write_set: Callable[..., Iterator[str]]) -> int:
    disk = disks["counting"]()
    list(write_set(folder, disk))
    return int(disk.operations)


def test_W1_killed_before_any_file_operation_a_shard_is_visible_only_if_complete(
    tmp_path: Path, disks: dict[str, Any], in_child: Callable[..., int], write_set: Any, expected: dict[str, bytes]
) -> None:
    operations = operations_of(disks, tmp_path / "counted", write_set)
    assert operations > 40
    for at in range(operations):
        folder = tmp_path / f"killed-{at}"
        assert in_child(lambda folder=folder, at=at: list(write_set(folder, disks["deadly"](at)))) == 9
        require_sound(folder, expected, [])
        require_resumable(folder, expected, write_set)


def lose_power(
    root: Path, at: int | None, lie: int | None, disks: dict[str, Any], write_set: Any, expected: dict[str, bytes]
) -> tuple[list[Path], int]:
    """Write on a forgetful disk until operation `at`; check every image. Returns the images and the syncs made."""
    live = root / "live"
    live.mkdir(parents=True)
    disk = disks["forgetful"](live, at, lie=lie)
    promised: list[str] = []
    with contextlib.suppress(disk.PowerLoss):
        promised.extend(write_set(live / "set", disk))
    images = []
    for number, image in enumerate(disk.images()):
        folder = root / f"image-{number}"
        folder.mkdir()
        for path, content in sorted(image.items()):
            target = folder / path.relative_to(live)
            if content is None:
                target.mkdir(exist_ok=True)
            else:
                target.write_bytes(content)
        require_sound(folder / "set", expected, promised)
        images.append(folder / "set")
    return images, disk.syncs


def test_W2_what_was_promised_survives_power_loss_at_every_operation(
    tmp_path: Path, disks: dict[str, Any], write_set: Any, expected: dict[str, bytes]
) -> None:
    operations = operations_of(disks, tmp_path / "counted", write_set)
    for at in [*range(operations), None]:
        images, _ = lose_power(tmp_path / f"lost-{at}", at, None, disks, write_set, expected)
        for image in images:
            require_resumable(image, expected, write_set)


def test_W2_a_writer_that_omits_any_one_sync_is_caught(
    tmp_path: Path, disks: dict[str, Any], write_set: Any, expected: dict[str, bytes]
) -> None:
    operations = operations_of(disks, tmp_path / "counted", write_set)
    _, syncs = lose_power(tmp_path / "honest", None, None, disks, write_set, expected)
    assert syncs == 14, "one for each of two folders, two for each of six files"

    def lose_power_everywhere(lie: int) -> None:
        for at in [*range(operations), None]:
            lose_power(tmp_path / f"lie-{lie}-{at}", at, lie, disks, write_set, expected)

    for lie in range(syncs):
        with pytest.raises(AssertionError):
            lose_power_everywhere(lie)


def test_W2_a_name_found_published_is_made_durable_before_it_is_relied_upon(
    tmp_path: Path, disks: dict[str, Any]
) -> None:
    disk = disks["forgetful"](tmp_path)
    publish(tmp_path, "x.arrow", b"content", disk=disk)
    disk.pending.append((tmp_path / "x.arrow", disk.names.pop(tmp_path / "x.arrow"), True))
    assert not publish(tmp_path, "x.arrow", b"content", disk=disk)
    assert all(image[tmp_path / "x.arrow"] == b"content" for image in disk.images())


def test_W4_an_exception_while_encoding_leaves_nothing_and_reaches_the_caller(
    tmp_path: Path, contract: Contract, records: list[Record]
) -> None:
    broken = dataclasses.replace(records[1], entropy_N=records[1].entropy_N * float("nan"))
    with pytest.raises(InvalidRecord):
        write_shard(tmp_path, "train-00000", "train", contract, [records[0], broken])
    assert list(tmp_path.iterdir()) == []


def test_W4_an_exception_while_writing_leaves_nothing_and_reaches_the_caller(tmp_path: Path) -> None:
    class Interrupted(durable.LocalDisk):
        def fsync(self, descriptor: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, "x.arrow", b"content", disk=Interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_W5_a_refusal_at_any_operation_is_explained_and_resumable(
    tmp_path: Path, error: int, disks: dict[str, Any], write_set: Any, expected: dict[str, bytes]
) -> None:
    operations = operations_of(disks, tmp_path / "counted", write_set)
    refusals: list[StorageFailed] = []
    for at in range(operations):
        folder, promised = tmp_path / f"refused-{at}", []
        try:
            promised.extend(write_set(folder, disks["failing"](at, error)))
        except StorageFailed as refusal:
            refusals.append(refusal)
        require_sound(folder, expected, promised)
        require_resumable(folder, expected, write_set)
    tidying = 2 * len(expected)
    assert len(refusals) == operations - tidying, "only the tidying after a publish may fail in silence"
    assert all(os.strerror(error) in str(refusal) for refusal in refusals)
    assert all(("make room" in refusal.hint) == (error != errno.EIO) for refusal in refusals)


def test_the_first_writer_of_a_name_wins(tmp_path: Path) -> None:
    assert publish(tmp_path, "x", b"first")
    assert not publish(tmp_path, "x", b"second")
    assert visible(tmp_path) == {"x": b"first"}


def test_a_writer_that_loses_the_race_between_looking_and_linking_leaves_the_winner(tmp_path: Path) -> None:
    class Late(durable.LocalDisk):
        def exists(self, path: Path) -> bool:
            return False

    publish(tmp_path, "x", b"first")
    assert not publish(tmp_path, "x", b"second", disk=Late())
    assert visible(tmp_path) == {"x": b"first"}
    assert list(tmp_path.glob(".*")) == []


def test_temporary_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    alive, dead = tmp_path / ".x.arrow.1.tmp", tmp_path / ".x.arrow.2.tmp"
    descriptor = LOCAL_DISK.create(alive)
    LOCAL_DISK.close(LOCAL_DISK.create(dead))
    (tmp_path / "x.arrow").write_bytes(b"published")
    assert remove_abandoned(tmp_path) == [dead.name]
    assert alive.exists()
    assert (tmp_path / "x.arrow").exists()
    LOCAL_DISK.close(descriptor)


def test_on_nfs_what_the_dead_left_goes_too(tmp_path: Path, nfs_locks: None) -> None:
    (tmp_path / ".x.9.tmp").write_bytes(b"")
    assert publish(tmp_path, "x", b"content")
    assert remove_abandoned(tmp_path) == [".x.9.tmp"]


def test_a_file_taken_for_abandoned_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []
    flock = durable.fcntl.flock

    def slow(file: Any, operation: int) -> None:
        if not taken:
            taken.append([])
            taken[0] = remove_abandoned(tmp_path)
        flock(file, operation)

    monkeypatch.setattr(durable.fcntl, "flock", slow)
    assert publish(tmp_path, "x", b"content")
    assert len(taken[0]) == 1
    assert visible(tmp_path) == {"x": b"content"}


def test_without_locks_files_are_written_and_none_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(durable.fcntl, "flock", unsupported)
    assert publish(tmp_path, "x", b"content")
    (tmp_path / ".x.9.tmp").write_bytes(b"")
    assert remove_abandoned(tmp_path) == []
    assert visible(tmp_path) == {"x": b"content"}


def test_the_bytes_of_a_shard_depend_on_its_records_alone(contract: Contract, records: list[Record]) -> None:
    assert build_shard("u", "train", contract, records) == build_shard("u", "train", contract, list(records))
    assert build_shard("u", "train", contract, records) != build_shard("u", "dev", contract, records)


def test_an_unfinished_set_says_so(tmp_path: Path, contract: Contract) -> None:
    begin(tmp_path, contract)
    with pytest.raises(ShardError, match="manifest") as failure:
        read_manifest(tmp_path)
    assert "goes on where it stopped" in failure.value.hint
