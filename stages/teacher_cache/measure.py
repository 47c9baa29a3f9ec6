"""How faithful a cache is: some of its samples, written and read back, beside the teacher's full distributions.

Measured while the teacher is loaded, and published with the set (`teacher/fidelity.json`): afterwards nobody could.
Record and distribution are of one pass over the sample, so that what differs is what a shard loses; how far another
pass of the teacher lies from the published record is told beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from shards.contract import Contract
from shards.fidelity import KL_AS_ONE, MEAN, Fidelity
from shards.manifest import FIDELITY_FILE, TEACHER_FOLDER, ShardInfo, publish_teacher_files
from shards.record import Record
from shards.shard import ShardReader
from shards.storage import Storage
from shards.writer import write_shard
from stages.corpus.sample import Sample
from stages.events import Emit, Note
from stages.teacher_cache.replica import STAGE, Replica, ReplicaDied

_POSITIONS = 512
_KL = f"{KL_AS_ONE}, {MEAN}"
_OF_ANOTHER = " (another pass)"


def measured_fidelity(
    storage: Storage,
    contract: Contract,
    tables: bytes | None,
    shards: Sequence[ShardInfo],
    replicas: Sequence[Replica],
    emit: Emit,
) -> dict[str, bytes]:
    """The report on some validation records, or train records where there are none, as a file of the teacher's folder.

    A folder keeps what was measured before; there is no file where no replica could tell.
    """
    path = f"{TEACHER_FOLDER}/{FIDELITY_FILE}"
    if storage.exclusive and storage.size(path) is not None:
        return {}
    records = _chosen(storage, shards)
    for replica in replicas:
        try:
            report = _measured(contract, tables, records, replica)
        except ReplicaDied as death:
            emit(Note(stage=STAGE, text=f"{replica.name} died while fidelity was measured: {death}", level="warning"))
            continue
        files = {FIDELITY_FILE: f"{json.dumps(report, indent=1)}\n".encode()} if report else {}
        if storage.exclusive:  # at once, so that no teacher is loaded for it again
            publish_teacher_files(storage, files)
        return files
    return {}


def _chosen(storage: Storage, shards: Sequence[ShardInfo]) -> list[Record]:
    """As many records as it takes, at least one, in the order of the plan."""
    ordered = sorted(shards, key=lambda shard: (shard.split != "dev", shard.name))
    found: list[Record] = []
    for info in ordered:
        with ShardReader.open(storage.local(info.name, sha256=info.sha256, size=info.bytes)) as shard:
            for row in range(len(shard)):
                if sum(record.positions for record in found) >= _POSITIONS:
                    return found
                found.append(shard[row])
    return found


def _measured(
    contract: Contract, tables: bytes | None, published: Sequence[Record], replica: Replica
) -> Mapping[str, float]:
    samples = [
        Sample(sample_id=record.sample_id, prompt_ids=record.prompt_ids_P, response_ids=record.response_ids_R)
        for record in published
    ]
    lost, another_pass = Fidelity(contract), Fidelity(contract)
    replica.start(lambda: True)
    measured = 0
    with TemporaryDirectory() as scratch:
        for before, (record, logprobs_NV) in zip(published, replica.full(samples), strict=False):  # or none
            full_NV = logprobs_NV.astype(np.float64)
            lost.add(_read_back(Path(scratch), str(measured), contract, tables, record), full_NV)
            another_pass.add(before, full_NV)
            measured += 1
    if not measured:
        return {}
    again = {f"{name}{_OF_ANOTHER}": value for name, value in another_pass.report().items() if name == _KL}
    return {**lost.report(), **again}


def _read_back(scratch: Path, unit: str, contract: Contract, tables: bytes | None, record: Record) -> Record:
    """The record as a shard gives it back."""
    info = write_shard(scratch, unit, "dev", contract, [record], tables=tables)
    with ShardReader.open(scratch / info.name) as shard:
        return shard[0]
