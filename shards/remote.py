"""A shard set in an object store (s3://, gs://) through pyarrow.fs.

- An object appears whole or not at all; what a failed upload may leave is told by its size and removed.
- The store refuses no taken name, so nothing depends on that: shards are named by their content, and a set exists from
  the moment of its manifest. Two writers that seal at the same moment both write a complete and true manifest over the
  same shards; the later stays.
- Whatever the store's client raises becomes StorageFailed or Incomplete, after the client's own retries.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from shards.errors import Incomplete, StorageFailed
from shards.object_cache import ObjectCache
from shards.storage import QUARANTINE

SCHEMES = ("s3", "gs")
_COPY_BYTES = 8 << 20
_SECRET = re.compile(r"(?<=://)[^/@]*@")
"""Keys that a URL may carry; messages show none."""
_CHECK_ACCESS = "check the URL, the credentials of this machine and the network, and run the same command again"


class RemoteStorage:
    """The objects under one prefix."""

    exclusive = False

    def __init__(self, filesystem: fs.FileSystem, root: str, *, url: str, cache: ObjectCache) -> None:
        self._files, self._root, self._url, self._cache = filesystem, root.rstrip("/"), url.rstrip("/"), cache

    @classmethod
    def at(cls, url: str, *, cache: ObjectCache) -> RemoteStorage:
        """Open a URL as pyarrow.fs understands it, options in its query included (`?endpoint_override=…&scheme=http`).

        Raises ValueError for another scheme, StorageFailed where the client cannot be set up.
        """
        if url.split("://")[0] not in SCHEMES:
            raise ValueError(f"{url}: shards lie in a folder or under {' or '.join(f'{name}://' for name in SCHEMES)}")
        # What fits into one part is then put by one request, whole or not at all.
        options = "&".join((*url.split("?")[1:], *(("allow_delayed_open=true",) if url.startswith("s3:") else ())))
        try:
            filesystem, root = fs.FileSystem.from_uri(f"{url.split('?')[0]}?{options}")
        except (OSError, pa.ArrowException) as error:
            raise StorageFailed(f"{_SECRET.sub('', url)} cannot be opened: {error}", hint=_CHECK_ACCESS) from error
        return cls(filesystem, root, url=_SECRET.sub("", url.split("?")[0]), cache=cache)

    def where(self, name: str = "") -> str:
        return f"{self._url}/{name}".rstrip("/")

    def prepare(self) -> None:
        """Nothing to do: prefixes are not made, and an interrupted put leaves no object."""

    def publish(self, name: str, data: bytes) -> bool:
        with self._explained(name):
            if self._stored(name) is not None:
                return False
            try:
                with self._files.open_output_stream(self._path(name)) as stream:
                    stream.write(data)
            except FileNotFoundError as error:
                raise OSError(f"there is no such bucket: {error}") from error
            except BaseException:
                self._remove_torso(name, len(data))
                raise
        return True

    def size(self, name: str) -> int | None:
        with self._explained(name):
            return self._stored(name)

    def names(self, folder: str = "") -> list[str]:
        with self._explained(folder):
            found = self._files.get_file_info(fs.FileSelector(self._path(folder), allow_not_found=True))
        files = sorted((info.mtime_ns or 0, info.base_name) for info in found if info.type == fs.FileType.File)
        return [f"{folder}/{name}" if folder else name for _, name in files]

    def read(self, name: str, *, most: int) -> bytes:
        with self._explained(name), self._files.open_input_file(self._path(name)) as file:
            if file.size() > most:
                raise ValueError(f"{self.where(name)} is too large to be true")
            return bytes(file.read())

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._explained(name), self._files.open_input_stream(self._path(name)) as source:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def local(self, name: str, *, sha256: str, size: int | None = None) -> Path:
        def fetch(target: Path) -> None:
            open_source = self._files.open_input_stream
            with self._explained(name), open_source(self._path(name)) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BYTES)

        return self._cache.path(sha256, size, fetch, called=self.where(name))

    def local_folder(self, folder: str, files: Mapping[str, str]) -> Path:
        return self._cache.folder_of(
            {name: self.local(f"{folder}/{name}", sha256=sha256) for name, sha256 in files.items()}
        )

    def set_aside(self, name: str) -> None:
        with self._explained(name):
            if self._stored(name) is not None:
                self._files.copy_file(self._path(name), self._path(f"{QUARANTINE}/{name}"))
                self._files.delete_file(self._path(name))

    def _remove_torso(self, name: str, size: int) -> None:
        """Closing the stream of a failed upload may complete it with what had arrived."""
        with contextlib.suppress(OSError, pa.ArrowException):  # why the upload failed is what counts
            if self._stored(name) not in (None, size):
                self._files.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _stored(self, name: str) -> int | None:
        info = self._files.get_file_info(self._path(name))
        return int(info.size) if info.type == fs.FileType.File else None

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise Incomplete(f"{self.where(name)} is not there", hint="check the URL, or run stage one") from error
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # this machine's disk, not the store
            raise StorageFailed(f"{self.where(name)}: the store refused: {error}", hint=_CHECK_ACCESS) from error
