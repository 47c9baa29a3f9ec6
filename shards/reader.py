"""A complete shard set as sequences of records, one a split.

- Opening reads the manifest; opening a split reads the plain columns of its shards. Payloads are decoded one record
  at a time, when asked for.
- At most `MAX_OPEN` shards are mapped at once, whatever the set's size. Threads may share a set.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, Truncated
from shards.framing import RESTORE
from shards.manifest import MANIFEST_NAME, TEACHER_FOLDER, Manifest, ShardInfo, file_sha256, read_manifest
from shards.record import Record
from shards.shard import ShardReader

__all__ = ["ShardReader", "ShardSet", "Split"]

MAX_OPEN = 256


class ShardSet:
    """A folder with a published manifest."""

    def __init__(self, folder: Path) -> None:
        """Raises Incomplete where stage one has not finished, Corrupt, Truncated or UnknownVersion."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._open: OrderedDict[str, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def contract(self) -> Contract:
        return self.manifest.contract

    @property
    def teacher_folder(self) -> Path:
        """Where the tokenizer and whatever else the student takes from its teacher lie."""
        return self.folder / TEACHER_FOLDER

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({shard.split for shard in self.manifest.shards}))

    def split(self, name: str) -> Split:
        """The records of one split, in the order of the manifest. Raises ValueError where there is no such split."""
        if name not in self.splits:
            raise ValueError(f"no split {name!r} in {self.folder}, which has {', '.join(self.splits)}")
        return Split(self, tuple(shard for shard in self.manifest.shards if shard.split == name))

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

    def verify(self) -> None:
        """Raise for the first file whose bytes differ from the manifest or from their own seal."""
        for name in self.manifest.teacher_files:
            self.verify_teacher_file(name)
        for info in self.manifest.shards:
            self.verify_shard(info)

    def verify_shard(self, info: ShardInfo) -> None:
        """Raises Truncated, Corrupt, Incomplete or UnknownVersion."""
        shard = self._opened(info)
        shard.verify()
        if file_sha256(shard.path) != info.sha256:
            raise Corrupt(f"{shard.path} is a whole shard, but not the one of {MANIFEST_NAME}", hint=RESTORE)

    def verify_teacher_file(self, name: str) -> None:
        """Raises Corrupt or Incomplete."""
        path = self.teacher_folder / name
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise Incomplete(f"{path} cannot be read: {error.strerror}", hint="restore the file") from error
        if digest != self.manifest.teacher_files[name]:
            raise Corrupt(f"{path} differs from {MANIFEST_NAME}", hint="restore the file")

    def _opened(self, info: ShardInfo) -> ShardReader:
        path = self.folder / info.name
        shard = ShardReader.open(path)
        if shard.size < info.bytes:
            raise Truncated(f"{path} has {shard.size} of {info.bytes} bytes", hint=RESTORE)
        self.contract.require_equal(shard.contract, where=str(path))
        if (shard.size, len(shard), shard.split, f"{shard.unit}.arrow") != (
            info.bytes,
            info.records,
            info.split,
            info.name,
        ):
            raise Corrupt(f"{path} is not the shard that {MANIFEST_NAME} lists", hint=RESTORE)
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
        return self._shards.open(self._infos[shard])[index - int(self._starts[shard])]

    @cached_property
    def sample_ids(self) -> NDArray[np.str_]:
        return np.array([name for info in self._infos for name in self._shards.open(info).sample_ids])

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """P of every record."""
        return self.column("prompt_length").astype(np.int32)

    @cached_property
    def response_lengths(self) -> NDArray[np.int32]:
        """R of every record."""
        return self.column("response_length").astype(np.int32)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """N of every record."""
        return self.column("positions").astype(np.int32)

    def column(self, name: str) -> NDArray[np.int32] | NDArray[np.float32]:
        """A plain column of one number a record: see FORMAT.md for the list."""
        return np.concatenate([self._shards.open(info).numbers(name) for info in self._infos])
