"""A shard set: contract.json is published first, manifest.json last. The set exists from the moment of the latter.

- Both are canonical JSON with a seal over themselves: a flipped bit anywhere is found when they are read.
- `begin` refuses a folder that was begun under another contract, naming the field and both values.
- `seal` refuses a set that lacks a shard or holds a sample twice, and can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shards.columns import ColumnsInfo, publish_columns
from shards.contract import Contract
from shards.errors import ContractMismatch, Corrupt
from shards.sealed_json import read_sealed, sealed
from shards.storage import RESTORE_FILE, Location, Storage, storage_at
from shards.units import GO_ON, Published, ShardInfo, describe, require_name, unit_of

__all__ = [
    "Manifest",
    "ShardInfo",
    "begin",
    "is_sealed",
    "publish_teacher_files",
    "read_contract",
    "read_manifest",
    "seal",
]

CONTRACT_NAME, MANIFEST_NAME, TEACHER_FOLDER = "contract.json", "manifest.json", "teacher"
TABLES_NAME = "codec.tables"
"""What the codec learnt, for writers that come later; readers take what stands in each shard."""
HEAD_PCA_FILE, HEAD_PCA_TENSOR = "head_pca.safetensors", "components_VW"
"""In the teacher's folder: its head in its W first principal directions, [V, W] fp16."""
FIDELITY_FILE = "fidelity.json"
"""In the teacher's folder: what the cache loses, measured while it was made."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEACHER_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesInfo:
    """The file of the codec's tables as the manifest lists it; `sha256` is that of the contract."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete shard set consists of."""

    contract: Contract
    shards: tuple[ShardInfo, ...]
    """By name."""
    teacher_files: Mapping[str, str]
    """sha256 of each file in the teacher's folder."""
    teacher_folder: str = TEACHER_FOLDER
    """Its name in the set."""
    columns: ColumnsInfo | None = None
    """The plain columns of all shards in one file; sets of the first format have none."""
    tables: TablesInfo | None = None
    """The codec's tables beside the shards; None where the set was sealed without that file."""

    def totals(self) -> dict[str, int]:
        """Shards, records, positions and bytes of the set."""
        return {
            "shards": len(self.shards),
            **{name: sum(getattr(shard, name) for shard in self.shards) for name in ("records", "positions", "bytes")},
        }


def begin(location: Location, contract: Contract) -> None:
    """Claim a place for a contract, or agree with the claim that is there.

    Removes what dead writers left half-written. Raises ContractMismatch naming the first field that differs, in an
    object store also where another writer claimed the place at the same moment and its claim stands.
    """
    storage = storage_at(location)
    storage.prepare()
    claimed = storage.publish(CONTRACT_NAME, sealed({"contract": json.loads(contract.to_json())}))
    if not (claimed and storage.exclusive):
        contract.require_equal(read_contract(storage), where=storage.where())


def publish_teacher_files(location: Location, files: Mapping[str, bytes]) -> str:
    """Publish what the student takes from its teacher, by file name; return the folder for `seal`.

    In a folder, files of teacher/ that are there already stay. In an object store, where nothing refuses a second
    writer, the folder is named by its contents. Raises StorageFailed, ValueError for a name that is none.
    """
    storage = storage_at(location)
    folder = TEACHER_FOLDER if storage.exclusive else f"{TEACHER_FOLDER}-{_digest_of(files)}"
    for name, data in files.items():
        storage.publish(f"{folder}/{require_name(name, _TEACHER_FILE)}", data)
    return folder


def seal(
    location: Location, contract: Contract, shards: Sequence[ShardInfo], *, teacher_folder: str = TEACHER_FOLDER
) -> Manifest:
    """Publish the manifest of a finished set, from when on it can be read, and return the one that stands.

    Where another writer was quicker with shards of the same units, that is the other's: in an object store it may have
    taken other bytes for a unit that both published. Hashes the teacher's files and gathers the plain columns. Raises
    Incomplete where a listed shard is missing, ValueError where a sample occurs twice, ContractMismatch where a set of
    other units is sealed there.
    """
    storage = storage_at(location)
    contract.require_equal(read_contract(storage), where=storage.where())
    infos = tuple(sorted(shards, key=lambda shard: shard.name))
    published = [_standing(storage, info, contract) for info in infos]
    _require_once_each(published)
    manifest = Manifest(
        contract=contract,
        shards=infos,
        teacher_files=_teacher_files(storage, teacher_folder),
        teacher_folder=teacher_folder,
        columns=publish_columns(storage, (shard.columns for shard in published)),
        tables=_tables(storage, contract),
    )
    if not storage.publish(MANIFEST_NAME, sealed(_document(manifest))):
        standing = read_manifest(storage)
        if (standing.contract, _units(standing)) != (manifest.contract, _units(manifest)):
            raise ContractMismatch(
                f"{storage.where()} is sealed already, with other contents",
                hint="write the new set to another place",
            )
        return standing
    return manifest


def _units(manifest: Manifest) -> list[tuple[str, str, int, int]]:
    """What was to be written, whatever bytes it became."""
    return sorted((unit_of(shard), shard.split, shard.records, shard.positions) for shard in manifest.shards)


def is_sealed(location: Location) -> bool:
    """Whether the set is complete. Its content is not looked at."""
    return storage_at(location).size(MANIFEST_NAME) is not None


def read_contract(location: Location) -> Contract:
    """What the set was begun with. Raises Incomplete where nothing was."""
    storage = storage_at(location)
    document = read_sealed(storage, CONTRACT_NAME, hint="run stage one to make the shards")
    return _contract(document, storage.where(CONTRACT_NAME))


def read_manifest(location: Location) -> Manifest:
    """The manifest of a complete set. Raises Incomplete where it is not finished, Corrupt, UnknownVersion."""
    storage = storage_at(location)
    begun = storage.size(CONTRACT_NAME) is not None
    hint = GO_ON if begun else "run stage one to make the shards"
    document, where = read_sealed(storage, MANIFEST_NAME, hint=hint), storage.where(MANIFEST_NAME)
    contract = _contract(document, where)
    try:
        manifest = Manifest(
            contract=contract,
            shards=tuple(ShardInfo(**shard) for shard in document["shards"]),
            teacher_files=dict(document["teacher_files"]),
            teacher_folder=require_name(document.get("teacher_folder", TEACHER_FOLDER)),
            columns=ColumnsInfo(**document["columns"]) if "columns" in document else None,
            tables=TablesInfo(**document["tables"]) if "tables" in document else None,
        )
        for shard in manifest.shards:
            require_name(shard.name)
        for name in manifest.teacher_files:
            require_name(name, _TEACHER_FILE)
        if manifest.tables not in (None, _tables_of(contract)):
            raise ValueError("its tables are not those of its contract")
        _require_digests(manifest)
        if _document(manifest) != document:
            raise ValueError("its totals contradict its shards")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"{where}: not a manifest: {error}", hint=RESTORE_FILE) from error
    return manifest


def _require_digests(manifest: Manifest) -> None:
    """Hashes become names of files: they must be nothing else."""
    columns = [] if manifest.columns is None else [manifest.columns.sha256]
    for digest in (*columns, *(shard.sha256 for shard in manifest.shards), *manifest.teacher_files.values()):
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{digest!r} is no sha256")


def _standing(storage: Storage, info: ShardInfo, contract: Contract) -> Published:
    published = describe(storage, info.name, contract, sha256=info.sha256)
    if published.info != info:
        raise Corrupt(f"{storage.where(info.name)} is not the shard that was written", hint=RESTORE_FILE)
    return published


def _require_once_each(shards: Sequence[Published]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for sample_id in shard.columns.column("sample_id").to_pylist():
            if sample_id in seen:
                raise ValueError(f"sample {sample_id!r} is in {seen[sample_id]} and again in {shard.info.name}")
            seen[sample_id] = shard.info.name


def _teacher_files(storage: Storage, folder: str) -> dict[str, str]:
    return {
        require_name(name.removeprefix(f"{folder}/"), _TEACHER_FILE): storage.sha256(name)
        for name in sorted(storage.names(folder))
    }


def require_tables(storage: Storage, contract: Contract) -> None:
    """Compare codec.tables with the hash in the contract. Raises Corrupt, or Incomplete where it is not there."""
    if storage.sha256(TABLES_NAME) != contract.tables:
        raise Corrupt(
            f"{storage.where(TABLES_NAME)} differs from what {CONTRACT_NAME} says of it",
            hint="delete it and run the same command again: it is taken from the shards",
        )


def _tables_of(contract: Contract) -> TablesInfo | None:
    return None if contract.tables is None else TablesInfo(name=TABLES_NAME, sha256=contract.tables)


def _tables(storage: Storage, contract: Contract) -> TablesInfo | None:
    if contract.tables is None or storage.size(TABLES_NAME) is None:
        return None
    require_tables(storage, contract)
    return _tables_of(contract)


def _digest_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "contract": json.loads(manifest.contract.to_json()),
        "shards": [asdict(shard) for shard in manifest.shards],
        "teacher_files": dict(manifest.teacher_files),
        "totals": manifest.totals(),
        **({} if manifest.teacher_folder == TEACHER_FOLDER else {"teacher_folder": manifest.teacher_folder}),
        **({} if manifest.columns is None else {"columns": asdict(manifest.columns)}),
        **({} if manifest.tables is None else {"tables": asdict(manifest.tables)}),
    }


def _contract(document: Mapping[str, Any], where: str) -> Contract:
    try:
        return Contract.from_json(json.dumps(document["contract"]))
    except KeyError as error:
        raise Corrupt(f"{where} holds no contract", hint=RESTORE_FILE) from error
