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
from pathlib import Path
from typing import Any

from shards.contract import Contract
from shards.durable import LOCAL_DISK, Disk, make_folder, publish, remove_abandoned
from shards.errors import ContractMismatch, Corrupt, Incomplete, Truncated
from shards.shard import ShardReader

CONTRACT_NAME, MANIFEST_NAME, TEACHER_FOLDER = "contract.json", "manifest.json", "teacher"
HEAD_PCA_FILE, HEAD_PCA_TENSOR = "head_pca.safetensors", "components_VW"
"""In the teacher's folder: its head in its W first principal directions, [V, W] fp16."""
MAX_MANIFEST_BYTES = 1 << 28
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,199}")
_TEACHER_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_END = b"\n}\n"
_RESTORE = "restore the file from where the shards came from"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    split: str
    records: int
    positions: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, *, contract: Contract) -> ShardInfo:
        """Describe a published shard. Raises ContractMismatch where it was written under another contract."""
        with ShardReader.open(path) as shard:
            contract.require_equal(shard.contract, where=str(path))
            return cls(
                name=path.name,
                split=shard.split,
                records=len(shard),
                positions=int(shard.numbers("positions").sum(dtype="int64")),
                bytes=shard.size,
                sha256=file_sha256(path),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete shard set consists of."""

    contract: Contract
    shards: tuple[ShardInfo, ...]
    """By name."""
    teacher_files: Mapping[str, str]
    """sha256 of each file in the folder teacher/."""

    def totals(self) -> dict[str, int]:
        """Shards, records, positions and bytes of the set."""
        return {
            "shards": len(self.shards),
            **{name: sum(getattr(shard, name) for shard in self.shards) for name in ("records", "positions", "bytes")},
        }


def begin(folder: Path, contract: Contract, *, disk: Disk = LOCAL_DISK) -> None:
    """Claim a folder for a contract, or agree with the claim that is there.

    Removes what dead writers left half-written. Raises ContractMismatch naming the first field that differs.
    """
    make_folder(folder, disk=disk)
    remove_abandoned(folder)
    document = {"contract": json.loads(contract.to_json())}
    if not publish(folder, CONTRACT_NAME, _sealed(document), disk=disk):
        contract.require_equal(read_contract(folder), where=str(folder))


def seal(folder: Path, contract: Contract, shards: Sequence[ShardInfo], *, disk: Disk = LOCAL_DISK) -> Manifest:
    """Publish the manifest of a finished set: from here on it can be read.

    Hashes the files in folder/teacher. Raises Incomplete where a listed shard is missing, ValueError where a sample
    occurs twice, ContractMismatch where the folder holds another set.
    """
    contract.require_equal(read_contract(folder), where=str(folder))
    manifest = Manifest(
        contract=contract,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        teacher_files=_teacher_files(folder),
    )
    _require_whole(folder, manifest)
    if not publish(folder, MANIFEST_NAME, _sealed(_document(manifest)), disk=disk):
        published = read_manifest(folder)
        if published != manifest:
            raise ContractMismatch(
                f"{folder} is sealed already, with other contents",
                hint="write the new set into another folder",
            )
    return manifest


def is_sealed(folder: Path) -> bool:
    """Whether the set is complete. Its content is not looked at."""
    return (folder / MANIFEST_NAME).exists()


def read_contract(folder: Path) -> Contract:
    """What the folder was begun with. Raises Incomplete where nothing was."""
    return _contract(_unsealed(folder, CONTRACT_NAME, hint="run stage one to make the shards"), folder / CONTRACT_NAME)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete set. Raises Incomplete where stage one has not finished, Corrupt, UnknownVersion."""
    begun = (folder / CONTRACT_NAME).exists()
    hint = "run stage one again: it goes on where it stopped" if begun else "run stage one to make the shards"
    document, path = _unsealed(folder, MANIFEST_NAME, hint=hint), folder / MANIFEST_NAME
    contract = _contract(document, path)
    try:
        manifest = Manifest(
            contract=contract,
            shards=tuple(ShardInfo(**shard) for shard in document["shards"]),
            teacher_files=dict(document["teacher_files"]),
        )
        for shard in manifest.shards:
            require_name(shard.name)
            if min(shard.records, shard.positions, shard.bytes) < 1:
                raise ValueError(f"{shard.name} is empty")
        for name in manifest.teacher_files:
            require_name(name, _TEACHER_FILE)
        if _document(manifest) != document:
            raise ValueError("its totals contradict its shards")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"{path}: not a manifest: {error}", hint=_RESTORE) from error
    return manifest


def require_name(name: str, allowed: re.Pattern[str] = _NAME) -> str:
    """A file name that stays inside its folder on every system. Raises ValueError for any other."""
    if not allowed.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a file of a shard set: it must match {allowed.pattern}")
    return name


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_whole(folder: Path, manifest: Manifest) -> None:
    """Every shard is there, and every sample once."""
    seen: dict[str, str] = {}
    for info in manifest.shards:
        with ShardReader.open(folder / info.name) as shard:
            if shard.size != info.bytes:
                raise Corrupt(f"{folder / info.name} has {shard.size} bytes, not {info.bytes}", hint=_RESTORE)
            for sample_id in shard.sample_ids:
                if sample_id in seen:
                    raise ValueError(f"sample {sample_id!r} is in {seen[sample_id]} and again in {info.name}")
                seen[sample_id] = info.name


def _teacher_files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in (folder / TEACHER_FOLDER).glob("[!.]*") if path.is_file())
    return {require_name(path.name, _TEACHER_FILE): file_sha256(path) for path in paths}


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "contract": json.loads(manifest.contract.to_json()),
        "shards": [asdict(shard) for shard in manifest.shards],
        "teacher_files": dict(manifest.teacher_files),
        "totals": manifest.totals(),
    }


def _sealed(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON with one more member, the sha256 of that JSON without it."""
    digest = hashlib.sha256(_canonical(document)).hexdigest()
    return _canonical({**document, "seal": digest})


def _unsealed(folder: Path, name: str, *, hint: str) -> dict[str, Any]:
    path = folder / name
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise Corrupt(f"{path} is too large to be true", hint=_RESTORE)
        content = path.read_bytes()
    except OSError as error:
        raise Incomplete(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    if not content.endswith(_END):
        raise Truncated(f"{path} ends after {len(content)} bytes, within its contents", hint=_RESTORE)
    try:
        document: dict[str, Any] = json.loads(content)
        document.pop("seal")
        intact = _sealed(document) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Corrupt(f"{path} differs from its seal", hint=_RESTORE)
    return document


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _contract(document: Mapping[str, Any], path: Path) -> Contract:
    try:
        return Contract.from_json(json.dumps(document["contract"]))
    except KeyError as error:
        raise Corrupt(f"{path} holds no contract", hint=_RESTORE) from error
