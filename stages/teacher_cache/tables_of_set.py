"""What the codec learns before a set is begun: a few samples are captured for it, evenly spread over the corpus."""

from __future__ import annotations

from collections.abc import Sequence

from shards.contract import Contract
from shards.learnt import EXAMPLES, tables_budget, with_tables
from shards.manifest import CONTRACT_NAME, read_contract
from shards.planes.codec import Planes3
from shards.record import Record
from shards.storage import Storage
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Emit, Note
from stages.teacher_cache.replica import STAGE, Replica, ReplicaDied
from stages.teacher_cache.worklist import DEATHS

_SHARE = 10
"""At most one in so many samples is captured twice."""


def codec_of(storage: Storage) -> str:
    """The codec that a set was begun with, be it an older one; of a new set the newest."""
    return read_contract(storage).codec if storage.size(CONTRACT_NAME) is not None else Planes3.name


def with_learnt_tables(
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
    largest = min(records_per_shard, len(samples))
    positions = sum(len(sample.response_ids) for sample in chosen) / len(chosen) * largest
    return with_tables(
        storage, contract, lambda: _captured(chosen, replica, emit), budget=tables_budget(int(positions))
    )


def _captured(samples: Sequence[Sample], replica: Replica, emit: Emit) -> list[Record]:
    """What is captured before a death is kept; a sample before which replicas die again and again is left out."""
    emit(Note(stage=STAGE, text=f"learning from {len(samples)} samples how to write the others in few bytes"))
    records: list[Record] = []
    first = deaths = 0
    while first < len(samples):
        try:
            replica.start(lambda: True)
            for said in replica.run(samples[first:]):
                if isinstance(said, Note):
                    emit(said)
                else:
                    records.append(said)
                    first, deaths = first + 1, 0
        except ReplicaDied as death:
            emit(Note(stage=STAGE, text=f"{replica.name} died and starts anew: {death}", level="warning"))
            deaths += 1
            if deaths == DEATHS:
                first, deaths = first + 1, 0
    if not records:
        raise StageError(
            f"{replica.name} died over every sample that the codec learns from",
            hint="look at its log above; memory is the usual reason: lower teacher.max_batched_tokens",
        )
    return records
