"""What the codec learns before a set is begun: a few samples are captured for it, evenly spread over the corpus."""

from __future__ import annotations

from collections.abc import Sequence

from shards.contract import Contract
from shards.learnt import EXAMPLES, tables_budget, with_tables
from shards.manifest import CONTRACT_NAME, read_contract
from shards.planes2.codec import Planes2
from shards.record import Record
from shards.storage import Storage
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Emit, Note
from stages.teacher_cache.replica import STAGE, Replica, ReplicaDied

_SHARE = 10
"""At most one in so many samples is captured twice."""
_ATTEMPTS = 3


def codec_of(storage: Storage) -> str:
    """The codec that a set was begun with, be it an older one; of a new set the newest."""
    return read_contract(storage).codec if storage.size(CONTRACT_NAME) is not None else Planes2.name


def calibrated(
    storage: Storage,
    contract: Contract,
    samples: Sequence[Sample],
    replica: Replica,
    emit: Emit,
    *,
    records_per_shard: int,
) -> tuple[Contract, bytes | None]:
    """The contract with its tables, and those; no teacher is loaded where the set has them already.

    Raises StageError where no replica survives the samples, StorageFailed.
    """
    chosen = samples[:: max(1, -(-len(samples) // min(EXAMPLES, -(-len(samples) // _SHARE))))]
    positions = sum(len(sample.response_ids) for sample in chosen) / len(chosen) * records_per_shard
    return with_tables(
        storage, contract, lambda: _captured(chosen, replica, emit), budget=tables_budget(int(positions))
    )


def _captured(samples: Sequence[Sample], replica: Replica, emit: Emit) -> list[Record]:
    emit(Note(stage=STAGE, text=f"learning from {len(samples)} samples how to write the others in few bytes"))
    for _ in range(_ATTEMPTS):
        try:
            replica.start(lambda: True)
            said = list(replica.run(samples))
        except ReplicaDied as death:
            emit(Note(stage=STAGE, text=f"{replica.name} died and starts anew: {death}", level="warning"))
            continue
        for note in said:
            if isinstance(note, Note):
                emit(note)
        return [record for record in said if isinstance(record, Record)]
    raise StageError(
        f"{replica.name} died {_ATTEMPTS} times over the samples that the codec learns from",
        hint="look at its log above; memory is the usual reason: lower teacher.max_batched_tokens",
    )
