"""One unit of work becomes one published shard, in a folder or in an object store.

    folder         <unit>.arrow                      its name is refused to a second writer
    object store   <unit>-<sha256>.arrow             the shard, named by its content
                   units/<unit>-<sha256>.json        published after it: the unit exists from this moment

In an object store two writers may both publish a unit. Its earliest `units/` object counts, equal times by name; which
one a set took stands in its manifest. That object also carries the shard's plain columns, so that neither resuming nor
sealing reads a shard back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from shards.columns import SCHEMA, columns_of
from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, Truncated
from shards.schema import STATISTICS
from shards.sealed_json import read_sealed, sealed
from shards.shard import ShardReader
from shards.storage import RESTORE_FILE, Storage

UNITS_FOLDER = "units"
GO_ON = "run the command that makes the set again: it goes on where it stopped"
_REMAKE = "delete it and run the same command again: it makes anew only what is missing"
_SHARD_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,199}")
_SUFFIX = ".arrow"
_BY_CONTENT = re.compile(r"(?P<unit>.+)-(?P<sha256>[0-9a-f]{64})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    split: str
    records: int
    positions: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if any(type(value) is not str for value in (self.name, self.split, self.sha256)):
            raise ValueError(f"name, split and sha256 of a shard must be text, not {self!r}")
        if any(type(count) is not int or count < 1 for count in (self.records, self.positions, self.bytes)):
            raise ValueError(f"{self.name} must have whole numbers of records, positions and bytes, from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A shard that is there, and its plain columns."""

    info: ShardInfo
    columns: pa.RecordBatch


def shard_name(unit: str, sha256: str, *, exclusive: bool) -> str:
    """Under which name a unit's shard lies. Raises ValueError for a unit that could leave its folder."""
    name = f"{unit}{_SUFFIX}" if exclusive else f"{unit}-{sha256}{_SUFFIX}"
    return require_name(name)


def unit_name(split: str, number: int) -> str:
    """How the units of a split are called, counted from 0."""
    return f"{split}-{number:05d}"


def is_shard(name: str) -> bool:
    """Whether a file of a set, by its name there, is a shard."""
    return name.endswith(_SUFFIX) and "/" not in name


def unit_of(shard: ShardInfo) -> str:
    """The unit that became this shard."""
    return shard.name.removesuffix(_SUFFIX).removesuffix(f"-{shard.sha256}")


def require_name(name: str, allowed: re.Pattern[str] = _SHARD_NAME) -> str:
    """A file name that stays inside its folder on every system. Raises ValueError for any other."""
    if not allowed.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a file of a shard set: it must match {allowed.pattern}")
    return name


def publish_unit(storage: Storage, unit: str, data: bytes, contract: Contract) -> ShardInfo:
    """Publish a shard's bytes and describe the shard that counts now for this unit: this one, or an earlier one.

    Raises StorageFailed, ContractMismatch where the earlier one is of another contract, or what reading it raises.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    name = shard_name(unit, sha256, exclusive=storage.exclusive)
    if storage.exclusive:
        if not storage.publish(name, data):
            return describe(storage, name, contract).info
        return _published(storage, name, sha256, data).info
    if unit not in published_units(storage):
        if storage.size(name) not in (None, len(data)):
            storage.set_aside(name)  # the torso of an upload that was killed while it failed
        storage.publish(name, data)
        document = _unit_document(_published(storage, name, sha256, data), contract)
        storage.publish(_unit_object(name), sealed(document))
    return describe(storage, published_units(storage)[unit], contract).info


def published_units(storage: Storage) -> dict[str, str]:
    """The units that are there, each with the name by which `describe` knows it. Lists names, opens nothing."""
    if storage.exclusive:
        return {name.removesuffix(_SUFFIX): name for name in storage.names() if is_shard(name)}
    units: dict[str, str] = {}
    for name in storage.names(UNITS_FOLDER):
        if found := _BY_CONTENT.fullmatch(name.removeprefix(f"{UNITS_FOLDER}/")):
            units.setdefault(found["unit"], shard_name(found["unit"], found["sha256"], exclusive=False))
    return units


def published_positions(storage: Storage) -> int:
    """Predicted positions of the units of a set that is not sealed. Raises what reading a damaged one raises."""
    total = 0
    for name in published_units(storage).values():
        with _not_sealed():
            if storage.exclusive:
                with ShardReader.open(storage.local(name, sha256="", size=0)) as shard:
                    total += int(shard.numbers("positions").sum(dtype="int64"))
            else:
                document = read_sealed(storage, _unit_object(name), hint=RESTORE_FILE)
                total += int(document["shard"]["positions"])
    return total


def describe(storage: Storage, name: str, contract: Contract, *, sha256: str | None = None) -> Published:
    """A published shard of a set that is not sealed. In a folder, where its hash is not given, every byte of it is
    checked and the hash is taken.

    Raises ContractMismatch where it was written under another contract, Corrupt, Truncated, Incomplete, StorageFailed.
    """
    with _not_sealed():
        if storage.exclusive:
            return _in_folder(storage, name, contract, sha256)
        return _in_store(storage, name, contract)


@contextlib.contextmanager
def _not_sealed() -> Iterator[None]:
    """Until a set is sealed there is nothing that verify-shards could compare it with."""
    try:
        yield
    except (Corrupt, Truncated) as error:
        raise type(error)(str(error), hint=_REMAKE) from error


def _unit_object(name: str) -> str:
    """The object that publishes a shard in an object store, by the shard's name."""
    return f"{UNITS_FOLDER}/{name.removesuffix(_SUFFIX)}.json"


def _in_folder(storage: Storage, name: str, contract: Contract, sha256: str | None) -> Published:
    with ShardReader.open(storage.local(name, sha256="", size=0)) as shard:
        contract.require_equal(shard.contract, where=storage.where(name))
        if sha256 is None:
            # What is adopted here will be vouched for by the manifest.
            shard.verify()
        return _described(shard, name, sha256 or storage.sha256(name))


def _in_store(storage: Storage, name: str, contract: Contract) -> Published:
    unit_object = _unit_object(name)
    document = read_sealed(storage, unit_object, hint=GO_ON)
    published = _from_document(document, contract, where=storage.where(unit_object), name=name)
    if (size := storage.size(name)) != published.info.bytes:
        raise Incomplete(
            f"{storage.where(name)} has {size or 0} of {published.info.bytes} bytes",
            hint=f"delete {storage.where(unit_object)} and run the same command again: it makes the shard anew",
        )
    return published


def set_aside_unit(storage: Storage, name: str) -> None:
    """Take a shard out of a set that is not sealed: its unit counts as not done."""
    if not storage.exclusive:
        storage.set_aside(_unit_object(name))
    storage.set_aside(name)


def _published(storage: Storage, name: str, sha256: str, data: bytes) -> Published:
    with ShardReader.of(data, called=storage.where(name)) as shard:
        return _described(shard, name, sha256)


def _described(shard: ShardReader, name: str, sha256: str) -> Published:
    columns = columns_of(shard)
    info = ShardInfo(
        name=name,
        split=shard.split,
        records=len(shard),
        positions=int(shard.numbers("positions").sum(dtype="int64")),
        bytes=shard.size,
        sha256=sha256,
    )
    return Published(info=info, columns=columns)


def _unit_document(published: Published, contract: Contract) -> dict[str, Any]:
    """JSON knows no NaN: a statistic that is not known is null."""
    columns = published.columns.to_pydict()
    for statistic in STATISTICS:
        columns[statistic] = [None if math.isnan(value) else value for value in columns[statistic]]
    return {"contract": json.loads(contract.to_json()), "shard": asdict(published.info), "columns": columns}


def _from_document(document: Mapping[str, Any], contract: Contract, *, where: str, name: str) -> Published:
    try:
        theirs = Contract.from_json(json.dumps(document["contract"]))
        info = ShardInfo(**document["shard"])
        stated = dict(document["columns"])
        for statistic in STATISTICS:
            stated[statistic] = [math.nan if value is None else value for value in stated[statistic]]
        columns = pa.RecordBatch.from_pydict(stated, schema=SCHEMA)
        if info.name != name or columns.num_rows != info.records:
            raise ValueError("it describes another shard")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise Corrupt(f"{where} does not describe a shard: {error}", hint=RESTORE_FILE) from error
    contract.require_equal(theirs, where=where)
    return Published(info=info, columns=columns)
