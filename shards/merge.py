"""Sets made of sets, without the teacher: one elsewhere, or several as one.

A copy has the same shards, byte for byte, whether it lies in a folder or in an object store. Where sets are merged,
rows are taken as they are; only a shard's name, its place in the set and the corpus in its contract are written anew.
Where the codec of a set learnt other tables than that of the first, its records are decoded and coded once more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shards.contract import Contract
from shards.errors import ContractMismatch
from shards.manifest import (
    FIDELITY_FILE,
    TABLES_NAME,
    Manifest,
    begin,
    is_sealed,
    publish_teacher_files,
    read_manifest,
    seal,
)
from shards.object_cache import ObjectCache
from shards.reader import ShardSet
from shards.shard import ShardReader
from shards.storage import Location, Storage, storage_at
from shards.units import ShardInfo, describe, publish_unit, published_units
from shards.writer import build_shard, rewrapped

Progress = Callable[[int, int], None]
"""Told how many records of how many are done."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """A shard of a source under its name in the merged set."""

    name: str
    source: ShardSet
    info: ShardInfo


def merge_sets(
    sources: Sequence[Location],
    target: Location,
    *,
    progress: Progress | None = None,
    cache: ObjectCache | None = None,
) -> Manifest:
    """Make one set of several: split by split their shards in the order given, every sample once.

    Stopped and called again with the same sources, it goes on. Raises ValueError for fewer than two sources or a sample
    that is in two of them, ContractMismatch where they differ in anything but the corpus, or where `target` holds
    another set, and what reading a damaged source raises.
    """
    if len(sources) < 2:
        raise ValueError("merging takes at least two sets")
    sets = [ShardSet(source, cache=cache) for source in sources]
    contract, storage = _common_contract(sets), storage_at(target, cache=cache)
    _require_apart(sets)
    files = _common_teacher_files(sets)
    return _make(storage, contract, list(_plan(sets)), files, progress)


def leaked_prompts(sources: Sequence[Location]) -> int:
    """How many prompts that validate in one set are trained on in another, so that they would in a set of both.

    One token is no prompt: it is where a text begins that has none.
    """
    sets = [ShardSet(source) for source in sources]
    validating: dict[bytes, set[int]] = {}
    for number, shards in enumerate(sets):
        for prompt in _prompts(shards, train=False):
            validating.setdefault(prompt, set()).add(number)
    trained = ((number, prompt) for number, shards in enumerate(sets) for prompt in _prompts(shards, train=True))
    return len({prompt for number, prompt in trained if validating.get(prompt, set()) - {number}})


def _prompts(shards: ShardSet, *, train: bool) -> Iterator[bytes]:
    """A digest of each prompt of the train split, or of the others."""
    for info in shards.manifest.shards:
        if (info.split == "train") == train:
            shard = shards.open(info)
            for prompt in map(shard.prompt, range(len(shard))):
                if len(prompt) > 1:
                    yield hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()
            shard.release_pages()


def copy_set(
    source: Location, target: Location, *, progress: Progress | None = None, cache: ObjectCache | None = None
) -> Manifest:
    """Make the same set in another place, folder or object store; stopped and called again, it goes on.

    Raises ContractMismatch where `target` holds another set, and what reading a damaged source raises.
    """
    shards = ShardSet(source, cache=cache)
    for name in shards.manifest.teacher_files:
        shards.verify_teacher_file(name)
    files = {name: (shards.teacher_folder / name).read_bytes() for name in shards.manifest.teacher_files}
    units = [_Unit(shards.open(info).unit, shards, info) for info in shards.manifest.shards]
    return _make(storage_at(target, cache=cache), shards.contract, units, files, progress)


def _make(
    storage: Storage,
    contract: Contract,
    units: Sequence[_Unit],
    files: Mapping[str, bytes],
    progress: Progress | None,
) -> Manifest:
    begin(storage, contract)
    if is_sealed(storage):
        return read_manifest(storage)
    tables = units[0].source.open(units[0].info).tables
    if tables is not None:
        storage.publish(TABLES_NAME, tables)
    done, total = 0, sum(unit.info.records for unit in units)
    there, infos = published_units(storage), list[ShardInfo]()
    for unit in units:
        if unit.name in there:
            infos.append(describe(storage, there[unit.name], contract).info)
        else:
            unit.source.verify_shard(unit.info)
            data = _taken(unit.source.open(unit.info), unit.name, contract, tables)
            infos.append(publish_unit(storage, unit.name, data, contract))
        done += unit.info.records
        if progress is not None:
            progress(done, total)
    return seal(storage, contract, infos, teacher_folder=publish_teacher_files(storage, files))


def _taken(shard: ShardReader, unit: str, contract: Contract, tables: bytes | None) -> bytes:
    if shard.contract.tables == contract.tables:
        return rewrapped(shard, unit, contract)
    records = [shard[row] for row in range(len(shard))]
    return build_shard(unit, shard.split, contract, records, tables=tables)


def merged_corpus(fingerprints: Sequence[str]) -> str:
    """The fingerprint of corpora put one after the other: sha256 over theirs, one a line."""
    return hashlib.sha256("".join(f"{fingerprint}\n" for fingerprint in fingerprints).encode()).hexdigest()


def _common_contract(sets: Sequence[ShardSet]) -> Contract:
    first = sets[0].contract
    for other in sets[1:]:
        theirs = other.contract
        replace(first, corpus_fingerprint=theirs.corpus_fingerprint, tables=theirs.tables).require_equal(
            theirs, where=other.where
        )
    return replace(first, corpus_fingerprint=merged_corpus([shards.contract.corpus_fingerprint for shards in sets]))


def _common_teacher_files(sets: Sequence[ShardSet]) -> dict[str, bytes]:
    """All but what was measured on one set alone."""
    first = _made_of_the_teacher(sets[0])
    for other in sets[1:]:
        theirs = _made_of_the_teacher(other)
        if different := sorted(name for name in {*first, *theirs} if first.get(name) != theirs.get(name)):
            raise ContractMismatch(
                f"{different[0]} of the teacher is not the same in {sets[0].where} and {other.where}",
                hint="merge sets that were made with the same settings of the teacher",
            )
    for name in first:
        sets[0].verify_teacher_file(name)
    return {name: (sets[0].teacher_folder / name).read_bytes() for name in first}


def _made_of_the_teacher(shards: ShardSet) -> dict[str, str]:
    return {name: sha256 for name, sha256 in shards.manifest.teacher_files.items() if name != FIDELITY_FILE}


def _require_apart(sets: Sequence[ShardSet]) -> None:
    seen: dict[str, str] = {}
    for shards in sets:
        for name in shards.columns.sample_ids(slice(None)).to_pylist():
            if name in seen:
                raise ValueError(f"sample {name!r} is in {seen[name]} and again in {shards.where}")
            seen[name] = shards.where


def _plan(sets: Sequence[ShardSet]) -> Iterator[_Unit]:
    numbers = Counter[str]()
    for shards in sets:
        for info in shards.manifest.shards:
            yield _Unit(f"{info.split}-{numbers[info.split]:05d}", shards, info)
            numbers[info.split] += 1
