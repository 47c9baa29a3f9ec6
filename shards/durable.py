"""Publishing a file: after `publish` returns, the file is whole, under its final name, and survives power loss.

    temporary name -> write -> fsync -> link, which fails if the name is taken -> fsync the folder

- A final name appears if and only if its content is complete; the first writer of a name wins, whoever comes later.
- Every file operation goes through a `Disk`, so that a test can fail, lose or reorder any one of them.
- A temporary file is locked while its writer lives. What a dead writer left is recognised by the missing lock, never
  by its age, a clock or a process id, and is removed by `remove_abandoned`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from shards.errors import StorageFailed

_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".", ".tmp"
_ROOM_MATTERS = (errno.ENOSPC, errno.EDQUOT)
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Disk(Protocol):
    """The file operations that a publish is made of. Each may raise OSError."""

    def exists(self, path: Path) -> bool: ...

    def mkdir(self, path: Path) -> None:
        """Make one folder; FileExistsError where it is there."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet, locked for as long as its descriptor is open."""

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`, at least one byte; return how many."""

    def fsync(self, descriptor: int) -> None: ...

    def close(self, descriptor: int) -> None: ...

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError where that name is taken."""

    def unlink(self, path: Path) -> None: ...

    def fsync_folder(self, path: Path) -> None: ...


class LocalDisk:
    """A POSIX file system with hard links; without advisory locks nothing is ever taken for abandoned."""

    def exists(self, path: Path) -> bool:
        return path.exists()

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            abandoned = os.fstat(descriptor).st_nlink == 0
        except BlockingIOError:
            abandoned = True
        except OSError as error:
            abandoned = False
            if error.errno not in _LOCKS_UNSUPPORTED:
                os.close(descriptor)
                raise
        if abandoned:
            os.close(descriptor)
            raise FileExistsError(errno.EEXIST, "removed as abandoned between creation and lock", str(path))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def fsync_folder(self, path: Path) -> None:
        sync(path)


LOCAL_DISK = LocalDisk()


def publish(folder: Path, name: str, data: bytes, *, disk: Disk = LOCAL_DISK) -> bool:
    """Make `data` appear as folder/name, whole and durable, unless that name is taken.

    Returns True if this call published it, False if it was there. In both cases the name is durable on return.
    Raises StorageFailed when the disk refuses; nothing published before is touched, and the call can be repeated.
    """
    target = folder / name
    with _explained(target):
        if not disk.exists(target) and _link_new(folder, target, data, disk):
            return True
        # The winner may have died before this step; whoever relies on the name must make it durable.
        disk.fsync_folder(folder)
        return False


def make_folder(folder: Path, *, disk: Disk = LOCAL_DISK) -> None:
    """Make a folder and its parents durably; a folder that is there is left as it is."""
    missing = list(itertools.takewhile(lambda path: not disk.exists(path), (folder, *folder.parents)))
    with _explained(folder):
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                disk.mkdir(path)
            disk.fsync_folder(path.parent)


def remove_abandoned(folder: Path) -> list[str]:
    """Remove the temporary files of writers that died; return their names. Those of living writers stay."""
    removed = []
    for path in sorted(folder.glob(f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}")):
        # Somebody else may remove it first, and a file system without locks cannot tell: both mean "leave it".
        with contextlib.suppress(OSError), open_to_lock(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path.name)
    return removed


def open_to_lock(path: Path) -> BinaryIO:
    """NFS locks only what is open for writing; elsewhere somebody else's file, which may only be read, will do."""
    try:
        return path.open("r+b")
    except OSError:
        return path.open("rb")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Of what a file holds, which is never in memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_new(folder: Path, target: Path, data: bytes, disk: Disk) -> bool:
    """Write a temporary file and link it to `target`; False where somebody else was first."""
    with temporary(folder, target.name, disk=disk) as (path, descriptor):
        _write_all(descriptor, data, disk)
        disk.fsync(descriptor)
        try:
            disk.link(path, target)
        except FileExistsError:
            return False
        disk.fsync_folder(folder)
        return True


@contextlib.contextmanager
def temporary(folder: Path, name: str, *, disk: Disk = LOCAL_DISK) -> Iterator[tuple[Path, int]]:
    """A new locked file beside the target. It is removed at the end, whatever happens in between."""
    while True:
        path = folder / f"{_TEMPORARY_PREFIX}{name}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
        try:
            descriptor = disk.create(path)
            break
        except FileExistsError:
            continue
    try:
        yield path, descriptor
    finally:
        # The content is published or given up by now: failing to tidy must not hide which of the two it was.
        with contextlib.suppress(OSError):
            disk.unlink(path)
        with contextlib.suppress(OSError):
            disk.close(descriptor)


def _write_all(descriptor: int, data: bytes, disk: Disk) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[disk.write(descriptor, rest) :]


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the system's refusal into a StorageFailed that says what to do."""
    try:
        yield
    except OSError as error:
        hint = "make room" if error.errno in _ROOM_MATTERS else "check the disk and the folder's permissions"
        raise StorageFailed(
            f"cannot publish {target}: {error.strerror or error}",
            hint=f"{hint}, then run the same command again: what was published before is intact and is not redone",
        ) from error
