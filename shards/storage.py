"""Where the files of a shard set lie: one Protocol, a local folder as its first form.

A storage holds whole files under short names. What the two forms differ in is who wins a name: a folder refuses a name
that is taken (`exclusive`), an object store may not, so there shards are named by their content and chosen by listing
(`shards.units`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from shards.durable import LOCAL_DISK, Disk, file_sha256, make_folder, publish, remove_abandoned
from shards.errors import StorageFailed, Truncated, unreadable
from shards.object_cache import ObjectCache

QUARANTINE = "quarantine"
RESTORE_FILE = "restore the file from where the shards came from"


class Storage(Protocol):
    """The files of one shard set. Names are relative and use "/"; `where(name)` is how messages call them."""

    exclusive: bool
    """Whether `publish` refuses a taken name atomically, so that of several writers the first wins."""

    def where(self, name: str = "") -> str:
        """The path or URL of a file, or of the whole."""

    def prepare(self) -> None:
        """Make room for a set. Removes what dead writers left half-written, where they leave anything."""

    def publish(self, name: str, data: bytes) -> bool:
        """Make `data` appear under `name`, whole and durable, unless that name is taken: then False.

        Raises StorageFailed; nothing published before is touched, and the call can be repeated.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def names(self, folder: str = "") -> list[str]:
        """The names of the files directly in a folder of the set, the folder included: first published first where
        the storage tells, else by name."""

    def read(self, name: str, *, most: int) -> bytes:
        """A small file. Raises Incomplete where it is not there, StorageFailed, ValueError beyond `most` bytes."""

    def sha256(self, name: str) -> str:
        """Of the file as it lies there. Raises Incomplete where it is not there, StorageFailed."""

    def local(self, name: str, *, sha256: str, size: int | None = None) -> Path:
        """The path of a file on this machine: itself, or a copy that was checked against `sha256`.

        Raises Incomplete, StorageFailed, Truncated or Corrupt."""

    def local_folder(self, folder: str, files: Mapping[str, str]) -> Path:
        """A folder on this machine with these files of a folder of the set, given with their sha256.

        Raises as `local`."""

    def set_aside(self, name: str) -> None:
        """Move a file into the folder quarantine/, out of the set. One that is gone is no error."""


Location = Path | str | Storage
"""A folder, a URL, or a storage that is open."""


def storage_at(location: Location, *, cache: ObjectCache | None = None) -> Storage:
    """The storage that a path or URL names. `cache` keeps the copies of a remote one, by default in the user's cache.

    Raises ValueError for a URL of an unknown kind, StorageFailed where the store's client cannot be set up.
    """
    if isinstance(location, Path) or (isinstance(location, str) and "://" not in location):
        return LocalStorage(Path(location))
    if isinstance(location, str):
        # Only a remote set pays for importing its file systems.
        from shards.remote import RemoteStorage

        return RemoteStorage.at(location, cache=cache or ObjectCache())
    return location


class LocalStorage:
    """A folder on a POSIX file system."""

    exclusive = True

    def __init__(self, folder: Path, *, disk: Disk = LOCAL_DISK) -> None:
        self.folder = folder
        self._disk = disk

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def prepare(self) -> None:
        make_folder(self.folder, disk=self._disk)
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            remove_abandoned(folder)

    def publish(self, name: str, data: bytes) -> bool:
        path = self.folder / name
        if "/" in name:
            make_folder(path.parent, disk=self._disk)
        return publish(path.parent, path.name, data, disk=self._disk)

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        paths = sorted(path for path in (self.folder / folder).glob("[!.]*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in paths]

    def read(self, name: str, *, most: int) -> bytes:
        path = self.folder / name
        try:
            if path.stat().st_size > most:
                raise ValueError(f"{path} is too large to be true")
            return path.read_bytes()
        except OSError as error:
            raise unreadable(str(path), error, missing=RESTORE_FILE) from error

    def sha256(self, name: str) -> str:
        path = self.folder / name
        try:
            return file_sha256(path)
        except OSError as error:
            raise unreadable(str(path), error, missing=RESTORE_FILE) from error

    def local(self, name: str, *, sha256: str, size: int | None = None) -> Path:  # noqa: ARG002
        path = self.folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise unreadable(str(path), error, missing=RESTORE_FILE) from error
        if size is not None and found < size:
            raise Truncated(f"{path} has {found} of {size} bytes", hint=RESTORE_FILE)
        return path

    def local_folder(self, folder: str, files: Mapping[str, str]) -> Path:  # noqa: ARG002
        return self.folder / folder

    def set_aside(self, name: str) -> None:
        path = self.folder / name
        target = self.folder / QUARANTINE / name
        if self.size(name) is None:
            return  # perhaps with its folder
        make_folder(target.parent, disk=self._disk)
        try:
            # A second quarantine of the same name replaces the first: the newest damage is the one to look at.
            with contextlib.suppress(FileNotFoundError):
                path.replace(target)
            self._disk.fsync_folder(target.parent)
            self._disk.fsync_folder(path.parent)
        except OSError as error:
            raise StorageFailed(
                f"{path} cannot be moved to {target}: {error.strerror}", hint="check who owns the folder"
            ) from error
