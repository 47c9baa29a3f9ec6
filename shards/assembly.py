"""A set made unit by unit of what is at hand, by one writer: of other sets, or of a dump. No teacher runs.

Stopped and called again with the same units, it goes on: what is published stays and is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shards.contract import Contract
from shards.manifest import TABLES_NAME, Manifest, begin, is_sealed, publish_teacher_files, read_manifest, seal
from shards.storage import Storage
from shards.units import ShardInfo, describe, publish_unit, published_units

Progress = Callable[[int, int], None]
"""Told how much of how much is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What becomes one shard."""

    name: str
    size: int
    """What it counts in the progress."""
    make: Callable[[], bytes]
    """The bytes of its shard. Not called where the shard is there."""


def make_set(
    storage: Storage,
    contract: Contract,
    units: Iterable[Unit],
    files: Callable[[], Mapping[str, bytes]],
    *,
    total: int,
    tables: bytes | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Publish every unit, then the teacher's files, then the manifest; a set that is sealed is left as it is.

    `total` is the size of all units; `tables` are those that the contract names, where nothing has published them yet.
    Raises ContractMismatch where another set stands there, StorageFailed, and what making a unit or a file raises.
    """
    begin(storage, contract)
    if is_sealed(storage):
        return read_manifest(storage)
    if tables is not None:
        storage.publish(TABLES_NAME, tables)
    there, infos, done = published_units(storage), list[ShardInfo](), 0
    for unit in units:
        if unit.name in there:
            infos.append(describe(storage, there[unit.name], contract).info)
        else:
            infos.append(publish_unit(storage, unit.name, unit.make(), contract))
        done += unit.size
        if progress is not None:
            progress(done, total)
    return seal(storage, contract, infos, teacher_folder=publish_teacher_files(storage, files()))
