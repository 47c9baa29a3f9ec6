"""How faithful a cache is: some of its published records beside the teacher's full distributions of their positions.

Measured while the teacher is loaded, and published with the set (`teacher/fidelity.json`): afterwards nobody could.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shards.contract import Contract
from shards.durable import make_folder, publish
from shards.fidelity import Fidelity
from shards.manifest import FIDELITY_FILE, TEACHER_FOLDER, ShardInfo
from shards.record import Record
from shards.shard import ShardReader
from stages.corpus.sample import Sample
from stages.events import Emit, Note
from stages.teacher_cache.replica import STAGE, Replica, ReplicaDied

_POSITIONS = 512


def publish_fidelity(
    folder: Path, contract: Contract, shards: Sequence[ShardInfo], replicas: Sequence[Replica], emit: Emit
) -> None:
    """Measure some validation records, or train records where there is no validation split; once a set."""
    if (folder / TEACHER_FOLDER / FIDELITY_FILE).exists():
        return
    records = _chosen(folder, shards)
    for replica in replicas:
        try:
            report = _measured(contract, records, replica)
        except ReplicaDied as death:
            emit(Note(stage=STAGE, text=f"{replica.name} died while fidelity was measured: {death}", level="warning"))
            continue
        if report:
            make_folder(folder / TEACHER_FOLDER)
            publish(folder / TEACHER_FOLDER, FIDELITY_FILE, f"{json.dumps(report, indent=1)}\n".encode())
        return


def read_fidelity(folder: Path) -> Mapping[str, float]:
    """What was measured; empty where nothing was."""
    path = folder / TEACHER_FOLDER / FIDELITY_FILE
    facts: Mapping[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return facts


def _chosen(folder: Path, shards: Sequence[ShardInfo]) -> list[Record]:
    """As many records as it takes, at least one, in the order of the plan."""
    ordered = sorted(shards, key=lambda shard: (shard.split != "dev", shard.name))
    found: list[Record] = []
    for info in ordered:
        with ShardReader.open(folder / info.name) as shard:
            for row in range(len(shard)):
                if sum(record.positions for record in found) >= _POSITIONS:
                    return found
                found.append(shard[row])
    return found


def _measured(contract: Contract, records: Sequence[Record], replica: Replica) -> Mapping[str, float]:
    samples = [
        Sample(sample_id=record.sample_id, prompt_ids=record.prompt_ids_P, response_ids=record.response_ids_R)
        for record in records
    ]
    fidelity = Fidelity(contract)
    replica.start(lambda: True)
    measured = 0
    for record, logprobs_NV in zip(records, replica.full(samples), strict=False):  # an engine may tell none
        fidelity.add(record, logprobs_NV.astype(np.float64))
        measured += 1
    return fidelity.report() if measured else {}
