"""Stage one: corpus -> teacher -> shards.

- Stopped or killed at any point and started again, it goes on with the units that are not published; where nothing is
  missing no teacher is loaded. The teacher's own files are published before the seal, and the seal comes last.
- The shards are the same whatever the number of replicas, and wherever they are written: a folder or an object store.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from shards.contract import Contract
from shards.durable import open_to_lock
from shards.manifest import (
    CONTRACT_NAME,
    Manifest,
    begin,
    is_sealed,
    publish_teacher_files,
    read_manifest,
    seal,
)
from shards.storage import LocalStorage, Location, Storage, storage_at
from stages.corpus.store import Corpus
from stages.events import Emit
from stages.teacher_cache.engines.protocol import CaptureSpec, EngineFactory
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.engines.vllm.prompt_logprobs import PromptLogprobsEngine
from stages.teacher_cache.job import Job
from stages.teacher_cache.measure import measured_fidelity
from stages.teacher_cache.plan import plan_units
from stages.teacher_cache.preflight import require_fits
from stages.teacher_cache.replica import EngineFacts, EngineOrder, Spread, in_process
from stages.teacher_cache.settings import CacheSettings, TeacherSettings
from stages.teacher_cache.tables_of_set import codec_of, with_learnt_tables
from stages.teacher_cache.teacher import TeacherFacts, read_facts, teacher_files, weights_fingerprint

ENGINES: Mapping[str, EngineFactory] = {"capture": VllmEngine, "prompt_logprobs": PromptLogprobsEngine}


def fill_cache(
    *,
    corpus: Corpus,
    teacher: TeacherSettings,
    cache: CacheSettings,
    teacher_folder: Path,
    target: Location,
    emit: Emit,
    engine: EngineFactory | None = None,
    spread: Spread = in_process,
) -> Manifest:
    """Bring the shard set at `target` to completion and return its manifest.

    Raises StageError where the teacher cannot be captured or does not fit the corpus, and ShardError where the disk or
    the store refuses or the set was begun under another contract.
    """
    storage = storage_at(target)
    facts = read_facts(teacher_folder)
    require_fits(corpus, teacher, cache, teacher_folder)
    spec = CaptureSpec(
        selection=cache.chosen(), curve=cache.curve, attention=cache.attention(facts.layers), seed=cache.draw_seed
    )
    with ExitStack() as stack:
        order = EngineOrder(
            factory=engine or ENGINES[teacher.engine], folder=teacher_folder, teacher=teacher, spec=spec
        )
        replicas = [stack.enter_context(closing(replica)) for replica in spread(order)]
        contract = _contract(corpus, teacher, teacher_folder, facts, spec, replicas[0].facts(), codec=codec_of(storage))
        contract, tables = with_learnt_tables(
            storage, contract, corpus.train, replicas[0], emit, records_per_shard=cache.records_per_shard
        )
        begin(storage, contract)
        if is_sealed(storage):
            return read_manifest(storage)
        job = Job(corpus=corpus, storage=storage, contract=contract, tables=tables, replicas=replicas, emit=emit)
        shards = job.run(plan_units(corpus.splits, cache.records_per_shard))
        fidelity = measured_fidelity(storage, contract, tables, shards, replicas, emit)
    with _alone(storage):
        files = teacher_files(teacher_folder, storage, pca_width=cache.pca_width, thinking=corpus.thinking)
        return seal(storage, contract, shards, teacher_folder=publish_teacher_files(storage, files | fidelity))


@contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    """Finish a folder as the only one of several writers. The kernel lets go of the lock when its holder dies.

    In an object store several may finish at once: each names what it adds by its content, and seals a whole set.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    with open_to_lock(storage.folder / CONTRACT_NAME) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _contract(
    corpus: Corpus,
    teacher: TeacherSettings,
    teacher_folder: Path,
    facts: TeacherFacts,
    spec: CaptureSpec,
    engine: EngineFacts,
    *,
    codec: str,
) -> Contract:
    return Contract(
        codec=codec,
        teacher=teacher.model,
        teacher_fingerprint=weights_fingerprint(teacher_folder),
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        start_token_id=corpus.start_token_id,
        end_token_id=corpus.end_token_id,
        selection=spec.selection,
        curve=spec.curve,
        attention=spec.attention,
        corpus_fingerprint=corpus.fingerprint,
        engine=engine.identity,
        dtype=engine.dtype,
    )
