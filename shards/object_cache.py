"""Copies of remote files on this machine, named by their sha256, up to a size; the least recently used go first.

- A copy is checked when it arrives, and once more by every process before that process uses it first.
- Processes share a cache: a copy appears whole by a rename, a file is fetched by one of them only, and one that is
  removed while somebody has it open stays readable there.
- The limit, or what the disk has left where that is less, may be passed by what is in use at one moment: the file just
  asked for is never refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shards.durable import file_sha256, remove_abandoned, temporary
from shards.errors import Corrupt, StorageFailed

DEFAULT_LIMIT = 64 << 30


def user_cache() -> Path:
    """Where what was fetched is kept: $MINICODFORMER_CACHE, else minicodformer in the user's cache."""
    if own := os.environ.get("MINICODFORMER_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicodformer"


class ObjectCache:
    """One folder of copies. Threads and processes may share it."""

    def __init__(self, folder: Path | None = None, *, limit: int | None = None) -> None:
        """`limit` in bytes, at least 1; by default what $MINICODFORMER_SHARD_CACHE_GB says, else 64 GiB.

        Raises StorageFailed where that is no size.
        """
        self.folder = user_cache() / "shards" if folder is None else folder
        self.limit = _limit_from_environment() if limit is None else limit
        self._checked: set[str] = set()

    def path(self, sha256: str, size: int | None, fetch: Callable[[Path], None], *, called: str) -> Path:
        """The copy of a file, of `size` bytes where that is known; where there is none, `fetch` writes it to a path.

        `called` is how messages call the file. Raises Corrupt where what arrives differs from its sha256, StorageFailed
        where this disk refuses, and whatever `fetch` raises.
        """
        path = self.folder / sha256
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder / f".{sha256[:2]}.lock"):
                while not self._intact(path, sha256, size):
                    self._make_room(size or 0, keep=path)
                    self._fetch(path, sha256, size, fetch, called)
        return path

    def folder_of(self, copies: Mapping[str, Path]) -> Path:
        """A folder in which copies have their own names. It keeps them, beyond the limit, until it is removed."""
        digest = hashlib.sha256("".join(f"{name} {path.name}\n" for name, path in sorted(copies.items())).encode())
        folder = self.folder / f".folder-{digest.hexdigest()[:32]}"
        with _explained(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in copies.items():
                _link(path, folder / name)
        return folder

    def _intact(self, path: Path, sha256: str, size: int | None) -> bool:
        """Whether a whole copy is there: before that is looked at, which may take long, and still afterwards."""
        try:
            os.utime(path)  # now, so that no other process takes it for the least recently used meanwhile
            whole = sha256 in self._checked or file_sha256(path) == sha256
            if not whole or size not in (None, path.stat().st_size):
                return False
        except FileNotFoundError:
            return False
        self._checked.add(sha256)
        return True

    def _fetch(self, path: Path, sha256: str, size: int | None, fetch: Callable[[Path], None], called: str) -> None:
        with temporary(self.folder, sha256) as (arriving, _):
            fetch(arriving)
            found = arriving.stat().st_size
            if size not in (None, found) or file_sha256(arriving) != sha256:
                raise Corrupt(
                    f"{called} arrived as {found} bytes, which differ from its checksum",
                    hint="try again; where it stays so, the remote file is damaged: verify-shards --quarantine",
                )
            arriving.replace(path)
            self._checked.add(sha256)

    def _make_room(self, size: int, *, keep: Path) -> None:
        """Remove the least recently used copies until `size` more bytes fit."""
        remove_abandoned(self.folder)
        copies = sorted(
            ((status.st_mtime_ns, status.st_size, path) for path, status in _copies(self.folder) if path != keep),
        )
        excess = size - min(self.limit - sum(held for _, held, _ in copies), shutil.disk_usage(self.folder).free)
        for _, held, path in copies:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            self._checked.discard(path.name)
            excess -= held


def _link(copy: Path, name: Path) -> None:
    """Give a copy a name. One of an earlier copy, which was damaged since and fetched anew, is replaced."""
    try:
        os.link(copy, name)
    except FileExistsError:
        if not name.samefile(copy):
            new = name.with_name(f".{name.name}.{secrets.token_hex(4)}.tmp")
            os.link(copy, new)
            new.replace(name)


def _copies(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("[!.]*"):
        # Another process may remove a copy at any moment.
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for whoever works on the same copy. The kernel lets go of the lock when its holder dies."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(
            f"the shard cache {folder} refuses: {error.strerror or error}",
            hint="make room, with MINICODFORMER_SHARD_CACHE_GB if by other copies, or fix the permissions, or set "
            "MINICODFORMER_CACHE to another folder",
        ) from error


def _limit_from_environment() -> int:
    stated = os.environ.get("MINICODFORMER_SHARD_CACHE_GB")
    if stated is None:
        return DEFAULT_LIMIT
    with contextlib.suppress(ValueError, OverflowError):  # the latter for "inf"
        if (limit := int(float(stated) * (1 << 30))) >= 1:
            return limit
    raise StorageFailed(
        f"MINICODFORMER_SHARD_CACHE_GB must be a number of GiB above 0, not {stated!r}",
        hint="set it above the size of the set, or unset it: then it is 64",
    )
