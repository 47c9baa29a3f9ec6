"""A complete shard set as sequences of records, one a split, whatever it lies in: a folder or an object store.

- Opening reads the manifest; opening a split maps the set's columns. No shard is opened before a record is asked for,
  and then payloads are decoded one record at a time.
- At most `MAX_OPEN` shards are mapped at once, and what was read of them is given back every `MAX_RESIDENT` bytes, so
  that memory stays flat whatever the set's size. Threads may share a set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from shards.columns import Columns, columns_of
from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, Truncated, unreadable
from shards.framing import RESTORE
from shards.manifest import FIDELITY_FILE, MANIFEST_NAME, Manifest, read_manifest
from shards.record import Record
from shards.shard import ShardReader
from shards.storage import RESTORE_FILE, Location, Storage, storage_at
from shards.units import ShardInfo, shard_name

__all__ = ["ShardReader", "ShardSet", "Split"]

MAX_OPEN = 256
MAX_RESIDENT = 1 << 26
"""Bytes, about, that reading keeps mapped before the pages are given back."""
AROUND = 6 << 20
"""What the system maps for a record beside its bytes: they, their offsets and their checksums lie in three places, and
around each it may map 2 MiB."""


class ShardSet:
    """A set with a published manifest."""

    def __init__(self, location: Location) -> None:
        """Raises Incomplete where the set is not finished, Corrupt, Truncated, UnknownVersion or StorageFailed, and
        ValueError for a URL of an unknown kind.
        """
        self.storage: Storage = storage_at(location)
        self.manifest: Manifest = read_manifest(self.storage)
        self._open: OrderedDict[str, ShardReader] = OrderedDict()
        self._read = 0
        self._touched = set[ShardReader]()
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        """The path or URL of the set."""
        return self.storage.where()

    @property
    def contract(self) -> Contract:
        return self.manifest.contract

    @property
    def teacher_folder(self) -> Path:
        """Where, on this machine, the tokenizer and whatever else the student takes from its teacher lie."""
        return self.storage.local_folder(self.manifest.teacher_folder, self.manifest.teacher_files)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({shard.split for shard in self.manifest.shards}))

    def split(self, name: str) -> Split:
        """The records of one split, in the order of the manifest. Raises ValueError where there is no such split."""
        if name not in self.splits:
            raise ValueError(f"no split {name!r} in {self.where}, which has {', '.join(self.splits)}")
        return Split(self, tuple(shard for shard in self.manifest.shards if shard.split == name))

    @cached_property
    def columns(self) -> Columns:
        """The plain columns of all shards. Raises Corrupt, Incomplete, Truncated or StorageFailed."""
        if self.manifest.columns is None:
            return Columns.gathered(columns_of(self.open(info)) for info in self.manifest.shards)
        return Columns.open(self.storage, self.manifest.columns, self.manifest.totals()["records"])

    def rows_of(self, info: ShardInfo) -> slice:
        """Where the columns of a shard lie in those of the set."""
        return self._rows[info.name]

    @cached_property
    def _rows(self) -> dict[str, slice]:
        starts = np.cumsum([0, *(info.records for info in self.manifest.shards)]).tolist()
        names = (info.name for info in self.manifest.shards)
        return {name: slice(*ends) for name, ends in zip(names, itertools.pairwise(starts), strict=True)}

    def open(self, info: ShardInfo) -> ShardReader:
        """A shard that the manifest lists. It stays open while it is among the last `MAX_OPEN` used."""
        with self._lock:
            if info.name not in self._open:
                self._open[info.name] = self._opened(info)
                # Readers that are still in use elsewhere keep their mapping: the set only lets go of it.
                while len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(info.name)
            return self._open[info.name]

    def locate(self, number: int) -> tuple[ShardInfo, int]:
        """The shard and row of a record, counted in the order of the manifest."""
        assert 0 <= number < self.manifest.totals()["records"]
        info = next(info for info in self.manifest.shards if number < self.rows_of(info).stop)
        return info, number - self.rows_of(info).start

    def record(self, info: ShardInfo, row: int) -> Record:
        """Decode one record of a shard, touching no other. Raises Corrupt naming the shard and the record."""
        shard = self.open(info)
        record = shard[row]
        with self._lock:
            self._touched.add(shard)
            self._read += shard.row_bytes(row) + AROUND
            if self._read >= MAX_RESIDENT:
                for touched in self._touched:
                    touched.release_pages()
                self._touched.clear()
                self._read = 0
        return record

    def verify_columns(self) -> None:
        """Raises Corrupt, Incomplete or Truncated."""
        assert self.manifest.columns is not None
        self._require_content(self.manifest.columns.name, self.manifest.columns.sha256)

    def verify_teacher_file(self, name: str) -> None:
        """Raises Corrupt or Incomplete."""
        self._require_content(self._teacher_name(name), self.manifest.teacher_files[name])

    def teacher_file(self, name: str) -> bytes:
        """What a file that the student takes from its teacher holds, as it was sealed. Raises Corrupt or Incomplete."""
        called, sha256 = self._teacher_name(name), self.manifest.teacher_files[name]
        try:
            content = self.storage.local(called, sha256=sha256).read_bytes()
        except OSError as error:
            raise unreadable(self.storage.where(called), error, missing=RESTORE_FILE) from error
        self._require_same(called, hashlib.sha256(content).hexdigest(), sha256)
        return content

    def fidelity(self) -> Mapping[str, float]:
        """What was measured against the teacher itself, by name; empty where nothing was. Raises as `teacher_file`."""
        if FIDELITY_FILE not in self.manifest.teacher_files:
            return {}
        facts: Mapping[str, float] = json.loads(self.teacher_file(FIDELITY_FILE))
        return facts

    def verify_shard(self, info: ShardInfo) -> None:
        """Raises Truncated, Corrupt, Incomplete or UnknownVersion."""
        if self.storage.sha256(info.name) != info.sha256:
            with self._opened(info) as shard:
                shard.verify()  # names the record where it can
            where = self.storage.where(info.name)
            raise Corrupt(f"{where} is a whole shard, but not the one of {MANIFEST_NAME}", hint=RESTORE)

    def _teacher_name(self, name: str) -> str:
        return f"{self.manifest.teacher_folder}/{name}"

    def _require_content(self, name: str, sha256: str) -> None:
        self._require_same(name, self.storage.sha256(name), sha256)

    def _require_same(self, name: str, found: str, sha256: str) -> None:
        if found != sha256:
            raise Corrupt(f"{self.storage.where(name)} differs from {MANIFEST_NAME}", hint=RESTORE_FILE)

    def _path(self, info: ShardInfo) -> Path:
        return self.storage.local(info.name, sha256=info.sha256, size=info.bytes)

    def _opened(self, info: ShardInfo) -> ShardReader:
        where = self.storage.where(info.name)
        try:
            shard = ShardReader.open(self._path(info), called=where)
        except Incomplete:
            # Another process may have dropped the copy from the cache between the two; a second time it is the file.
            shard = ShardReader.open(self._path(info), called=where)
        if shard.size < info.bytes:
            raise Truncated(f"{where} has {shard.size} of {info.bytes} bytes", hint=RESTORE)
        self.contract.require_equal(shard.contract, where=where)
        names = {shard_name(shard.unit, info.sha256, exclusive=exclusive) for exclusive in (True, False)}
        if (shard.size, len(shard), shard.split) != (info.bytes, info.records, info.split) or info.name not in names:
            raise Corrupt(f"{where} is not the shard that {MANIFEST_NAME} lists", hint=RESTORE)
        return shard


class Split(Sequence[Record]):
    """The records of one split. Lengths and statistics come from plain columns: no payload is decoded for them."""

    def __init__(self, shards: ShardSet, infos: tuple[ShardInfo, ...]) -> None:
        self._shards = shards
        self._infos = infos
        self._starts = np.cumsum([0, *(info.records for info in infos)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Decode one record, touching no other. Raises Corrupt naming the shard and the record."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards.record(self._infos[shard], index - int(self._starts[shard]))

    @cached_property
    def sample_ids(self) -> NDArray[np.str_]:
        columns = self._shards.columns
        return np.array([name for info in self._infos for name in columns.sample_ids(self._rows(info)).to_pylist()])

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """P of every record."""
        return self.column("prompt_length").astype(np.int32, copy=False)

    @cached_property
    def response_lengths(self) -> NDArray[np.int32]:
        """R of every record."""
        return self.column("response_length").astype(np.int32, copy=False)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """N of every record."""
        return self.column("positions").astype(np.int32, copy=False)

    def column(self, name: str) -> NDArray[np.int32] | NDArray[np.float32]:
        """A plain column of one number a record: see FORMAT.md for the list."""
        columns = self._shards.columns
        return np.concatenate([columns.numbers(name, self._rows(info)) for info in self._infos])

    def _rows(self, info: ShardInfo) -> slice:
        return self._shards.rows_of(info)
