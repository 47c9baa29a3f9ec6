"""Disks that fail, die or forget."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from shards.durable import LocalDisk


class CountingDisk(LocalDisk):
    """A local disk on which something happens just before the n-th operation, counted from 0."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.operations = 0

    def happen(self, operation: str) -> None:
        """What happens; nothing by default."""

    def _count(self, operation: str) -> None:
        if self.operations == self.at:
            self.operations += 1
            self.happen(operation)
            return
        self.operations += 1

    def mkdir(self, path: Path) -> None:
        self._count("mkdir")
        super().mkdir(path)

    def create(self, path: Path) -> int:
        self._count("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Three writes a file, so that a file can be caught half-written."""
        self._count("write")
        size = os.fstat(descriptor).st_size
        return super().write(descriptor, data[: max(1, (size + len(data)) // 3)])

    def fsync(self, descriptor: int) -> None:
        self._count("fsync")
        super().fsync(descriptor)

    def close(self, descriptor: int) -> None:
        self._count("close")
        super().close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self._count("link")
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._count("unlink")
        super().unlink(path)

    def fsync_folder(self, path: Path) -> None:
        self._count("fsync_folder")
        super().fsync_folder(path)


class DeadlyDisk(CountingDisk):
    """The process is killed just before the n-th operation, as by a power switch on the process."""

    def happen(self, operation: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailingDisk(CountingDisk):
    """The n-th operation fails with a system error; those after it work again."""

    def __init__(self, at: int | None, error: int) -> None:
        super().__init__(at)
        self.error = error

    def happen(self, operation: str) -> None:
        raise OSError(self.error, os.strerror(self.error))


class ForgetfulDisk(CountingDisk):
    """A disk that after a power loss holds what was synced, and of the names that were not, any part.

    Operations happen for real, so that readers see what a running system shows. Beside that a model is kept of what a
    power loss would leave: of each file the content at its last fsync, of each folder the names at its last fsync.
    `lie` makes the n-th sync return without having synced: the mutant that a test must catch.
    """

    class PowerLoss(BaseException):
        """The machine stopped here."""

    def __init__(self, root: Path, at: int | None = None, *, lie: int | None = None) -> None:
        super().__init__(at)
        self.root, self.lie, self.syncs, self.dead = root, lie, 0, False
        self.synced: list[bytes] = []
        """Content of each file, by its number, at its last fsync."""
        self.descriptors: dict[int, tuple[int, Path]] = {}
        self.live: dict[Path, int] = {}
        self.names: dict[Path, int | None] = {}
        """Durable names under the root, with the number of the file; None stands for a folder."""
        self.pending: list[tuple[Path, int | None, bool]] = []
        """Changes of names not yet synced: (path, file or None for a folder, whether it appears)."""

    def happen(self, operation: str) -> None:
        self.dead = True
        for descriptor in self.descriptors:
            os.close(descriptor)
        raise self.PowerLoss

    def _count(self, operation: str) -> None:
        if self.dead:
            raise self.PowerLoss
        super()._count(operation)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.pending.append((path, None, True))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self.live[path] = len(self.synced)
        self.synced.append(b"")
        self.descriptors[descriptor] = (self.live[path], path)
        self.pending.append((path, self.live[path], True))
        return descriptor

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        del self.descriptors[descriptor]

    def fsync(self, descriptor: int) -> None:
        super().fsync(descriptor)
        file, path = self.descriptors[descriptor]
        if self._truthful():
            self.synced[file] = path.read_bytes()

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.live[target] = self.live[source]
        self.pending.append((target, self.live[source], True))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.pending.append((path, self.live.pop(path), False))

    def fsync_folder(self, path: Path) -> None:
        super().fsync_folder(path)
        if self._truthful():
            for change in [change for change in self.pending if change[0].parent == path]:
                self.pending.remove(change)
                _apply(self.names, change)

    def images(self) -> Iterator[dict[Path, bytes | None]]:
        """Everything that a power loss now may leave under the root, once: content by path, None for a folder."""
        seen: list[dict[Path, bytes | None]] = []
        for kept in itertools.product((False, True), repeat=len(self.pending)):
            names = dict(self.names)
            for change in itertools.compress(self.pending, kept):
                _apply(names, change)
            names[self.root] = None
            image = {
                path: None if file is None else self.synced[file]
                for path, file in names.items()
                if all(parent in names for parent in path.parents if parent.is_relative_to(self.root))
            }
            if image not in seen:
                seen.append(image)
                yield image

    def _truthful(self) -> bool:
        self.syncs += 1
        return self.syncs - 1 != self.lie


def _apply(names: dict[Path, int | None], change: tuple[Path, int | None, bool]) -> None:
    path, inode, appears = change
    if appears:
        names[path] = inode
    else:
        names.pop(path, None)
