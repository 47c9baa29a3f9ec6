"""A whole set against its manifest, byte by byte; what is damaged is set aside, and made anew alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial

from shards.assembly import Progress
from shards.errors import Corrupt, ShardError, StorageFailed, Truncated, UnknownVersion
from shards.manifest import CONTRACT_NAME, MANIFEST_NAME, TABLES_NAME, read_contract, require_tables
from shards.reader import ShardSet
from shards.storage import Location, storage_at
from shards.units import is_shard, set_aside_unit

_MOST_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The verdict on a set: `damage` maps the name of each damaged file to what is wrong with it."""

    where: str
    shards: int
    teacher_files: int
    bytes: int
    """Of the shards."""
    damage: Mapping[str, str]

    @property
    def intact(self) -> bool:
        return not self.damage


@dataclass(frozen=True, slots=True)
class _Check:
    """One file: what to call, and what it counts in the progress."""

    name: str
    bytes: int
    run: Callable[[], None]


def verify_shards(location: Location, *, progress: Progress | None = None) -> VerifyReport:
    """Check every byte of a set against its manifest, several files at a time, and report all damage.

    A manifest that is damaged itself is reported as such, and nothing else is then. `progress` is told bytes. Raises
    Incomplete where there is none, StorageFailed, UnknownVersion.
    """
    storage = storage_at(location)
    try:
        shards = ShardSet(storage)
    except (Corrupt, Truncated) as error:
        return VerifyReport(
            where=storage.where(), shards=0, teacher_files=0, bytes=0, damage={MANIFEST_NAME: str(error)}
        )
    manifest, damage = shards.manifest, dict[str, str]()
    total, done = manifest.totals()["bytes"], 0
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="verify") as pool:
        working = {pool.submit(damage_of, check.run): check for check in _checks(shards)}
        try:
            for finished in as_completed(working):
                check, found = working[finished], finished.result()
                if found is not None:
                    damage[check.name] = found
                done += check.bytes
                if progress is not None and check.bytes:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return VerifyReport(
        where=shards.where,
        shards=len(manifest.shards),
        teacher_files=len(manifest.teacher_files),
        bytes=total,
        damage=dict(sorted(damage.items())),
    )


def quarantine(location: Location, report: VerifyReport) -> None:
    """Move the damaged files of a set into its folder quarantine/, and its manifest last.

    The set is unfinished from then on: what made it, run again, remakes what is missing, keeps the rest, and seals it.
    Killed in between, it can be repeated. Raises StorageFailed.
    """
    storage = storage_at(location)
    for name in report.damage:
        if is_shard(name):
            set_aside_unit(storage, name)
        elif name != MANIFEST_NAME:
            storage.set_aside(name)
    storage.set_aside(MANIFEST_NAME)


def damage_of(check: Callable[[], None]) -> str | None:
    """What is wrong with what a check looks at, in words; None where it passes.

    Raises StorageFailed and UnknownVersion: who cannot read a file knows of no damage to it.
    """
    try:
        check()
    except (StorageFailed, UnknownVersion):
        raise
    except ShardError as error:
        return str(error)
    return None


def _checks(shards: ShardSet) -> Iterator[_Check]:
    manifest = shards.manifest
    yield _Check(CONTRACT_NAME, 0, partial(_check_contract, shards))
    # Sets sealed before manifests named their tables may have the file all the same.
    if manifest.tables is not None or (shards.contract.tables and shards.storage.size(TABLES_NAME) is not None):
        yield _Check(TABLES_NAME, 0, partial(require_tables, shards.storage, shards.contract))
    if manifest.columns is not None:
        yield _Check(manifest.columns.name, 0, shards.verify_columns)
    for name in manifest.teacher_files:
        yield _Check(f"{manifest.teacher_folder}/{name}", 0, partial(shards.verify_teacher_file, name))
    for info in manifest.shards:
        yield _Check(info.name, info.bytes, partial(shards.verify_shard, info))


def _check_contract(shards: ShardSet) -> None:
    shards.contract.require_equal(read_contract(shards.storage), where=shards.storage.where(CONTRACT_NAME))
