"""Sets made of sets, without the teacher: one elsewhere, or several as one.

A copy has the same shards, byte for byte, whether it lies in a folder or in an object store. Where sets are merged,
rows are taken as they are; only a shard's name, its place in the set and the corpus in its contract are written anew.
Where the codec of a set learnt other tables than that of the first, its records are decoded and coded once more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from shards.assembly import Progress, Unit, make_set
from shards.contract import Contract
from shards.errors import ContractMismatch, InvalidRequest
from shards.manifest import FIDELITY_FILE, Manifest
from shards.reader import ShardSet
from shards.storage import Location, storage_at
from shards.units import ShardInfo, unit_name, unit_of
from shards.writer import build_shard, rewrapped


def merge_sets(sources: Sequence[Location], target: Location, *, progress: Progress | None = None) -> Manifest:
    """Make one set of several: split by split their shards in the order given, every sample once.

    `progress` is told records. Stopped and called again with the same sources, it goes on. Raises InvalidRequest for
    fewer than two sources or a sample that is in two of them, ContractMismatch where they differ in anything but the
    corpus, or where `target` holds another set, and what reading a damaged source raises.
    """
    if len(sources) < 2:
        raise InvalidRequest("merging takes at least two sets", hint="name another set of the same teacher")
    sets = [ShardSet(source) for source in sources]
    contract, files = _common_contract(sets), _common_teacher_files(sets)
    _require_apart(sets)
    return _made(sets, target, contract, _numbered(sets), files, progress)


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


def copy_set(source: Location, target: Location, *, progress: Progress | None = None) -> Manifest:
    """Make the same set in another place, folder or object store; stopped and called again, it goes on.

    `progress` is told records. Raises ContractMismatch where `target` holds another set, and what reading a damaged
    source raises.
    """
    shards = ShardSet(source)
    named = ((unit_of(info), shards, info) for info in shards.manifest.shards)
    return _made([shards], target, shards.contract, named, shards.manifest.teacher_files, progress)


def _made(
    sets: Sequence[ShardSet],
    target: Location,
    contract: Contract,
    named: Iterable[tuple[str, ShardSet, ShardInfo]],
    files: Iterable[str],
    progress: Progress | None,
) -> Manifest:
    """Of the shards of `sets` under new names, with the tables and these teacher's files of the first."""
    first = sets[0]
    tables = first.open(first.manifest.shards[0]).tables
    return make_set(
        storage_at(target),
        contract,
        (
            Unit(name=name, size=info.records, make=partial(_taken, shards, info, name, contract, tables))
            for name, shards, info in named
        ),
        lambda: {name: first.teacher_file(name) for name in files},
        total=sum(shards.manifest.totals()["records"] for shards in sets),
        tables=tables,
        progress=progress,
    )


def _numbered(sets: Sequence[ShardSet]) -> Iterator[tuple[str, ShardSet, ShardInfo]]:
    numbers = Counter[str]()
    for shards in sets:
        for info in shards.manifest.shards:
            yield unit_name(info.split, numbers[info.split]), shards, info
            numbers[info.split] += 1


def _taken(shards: ShardSet, info: ShardInfo, unit: str, contract: Contract, tables: bytes | None) -> bytes:
    shards.verify_shard(info)
    shard = shards.open(info)
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


def _common_teacher_files(sets: Sequence[ShardSet]) -> list[str]:
    """All but what was measured on one set alone."""
    first = _made_of_the_teacher(sets[0])
    for other in sets[1:]:
        theirs = _made_of_the_teacher(other)
        if different := sorted(name for name in {*first, *theirs} if first.get(name) != theirs.get(name)):
            raise ContractMismatch(
                f"{different[0]} of the teacher is not the same in {sets[0].where} and {other.where}",
                hint="merge sets that were made with the same settings of the teacher",
            )
    return list(first)


def _made_of_the_teacher(shards: ShardSet) -> dict[str, str]:
    return {name: sha256 for name, sha256 in shards.manifest.teacher_files.items() if name != FIDELITY_FILE}


def _require_apart(sets: Sequence[ShardSet]) -> None:
    seen: dict[str, str] = {}
    for shards in sets:
        for name in shards.columns.sample_ids(slice(None)).to_pylist():
            if name in seen:
                raise InvalidRequest(
                    f"sample {name!r} is in {seen[name]} and again in {shards.where}",
                    hint="merge sets of different corpora, each named once",
                )
            seen[name] = shards.where
