"""Stage one, the loop: corpus -> teacher -> shards.

- A unit of the plan is captured by the engine, handed to one writer thread, and exists once its shard is published.
- Killed at any point and started again, it goes on with the units that are not published; where nothing is missing
  the engine is not started. The teacher's own files are published before the seal, and the seal comes last.
- At most two units are held in memory: the one being captured and the one being written.
- An exception on either side ends the loop, reaches the caller and leaves the set unsealed.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shards.contract import AttentionSpec, Contract, Selection
from shards.manifest import CONTRACT_NAME, Manifest, ShardInfo, begin, is_sealed, read_manifest, seal
from shards.record import AttentionSummary, Record
from shards.topk_planes import TopkPlanes1
from shards.writer import write_shard
from stages.corpus.fingerprint import tokenizer_fingerprint
from stages.corpus.sample import Sample
from stages.corpus.store import Corpus
from stages.errors import StageError
from stages.events import Emit, Note, Progress
from stages.teacher_cache.engines.protocol import CaptureSpec, EngineFactory, TeacherEngine
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.plan import Unit, plan_units
from stages.teacher_cache.settings import CacheSettings, TeacherSettings
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal
from stages.teacher_cache.teacher import TeacherFacts, publish_teacher, read_facts, weights_fingerprint

STAGE = "teacher-cache"
_REPORTS = 200
"""Progress events of a whole run, about."""


def fill_cache(
    *,
    corpus: Corpus,
    teacher: TeacherSettings,
    cache: CacheSettings,
    teacher_folder: Path,
    folder: Path,
    emit: Emit,
    engine: EngineFactory = VllmEngine,
) -> Manifest:
    """Bring the shard set in `folder` to completion and return its manifest.

    Raises StageError where the teacher cannot be captured or does not fit the corpus, and ShardError where the disk
    refuses or the folder was begun under another contract.
    """
    facts = read_facts(teacher_folder)
    spec = CaptureSpec(
        k=cache.k,
        attention_layers=attention_layers(cache.attention_depths, facts.layers),
        attention_top_m=cache.attention_top_m,
    )
    with closing(engine(teacher_folder, teacher, spec)) as source:
        contract = _contract(corpus, teacher, teacher_folder, facts, spec, source)
        begin(folder, contract)
        if is_sealed(folder):
            return read_manifest(folder)
        job = _Job(corpus=corpus, folder=folder, contract=contract, engine=source, emit=emit)
        shards = job.run(plan_units({"train": len(corpus.train), "dev": len(corpus.dev)}, cache.records_per_shard))
    with _alone(folder):
        publish_teacher(teacher_folder, folder, pca_width=cache.pca_width, thinking=corpus.thinking)
        return seal(folder, contract, shards)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Finish the set as the only one of several writers. The kernel lets go of the lock when its holder dies."""
    with (folder / CONTRACT_NAME).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def attention_layers(depths: Sequence[float], layers: int) -> tuple[int, ...]:
    """Depths as fractions -> rising layer numbers: (1/3, 2/3, 35/36) are layers 12, 24 and 35 of 36."""
    return tuple(sorted({int(depth * layers + 1e-9) for depth in depths}))


@dataclass(slots=True, kw_only=True)
class _Job:
    """One run over the plan."""

    corpus: Corpus
    folder: Path
    contract: Contract
    engine: TeacherEngine
    emit: Emit
    _done: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)
    _reported: int = field(default=0, init=False)
    _shards: list[Future[ShardInfo]] = field(default_factory=list, init=False)

    def run(self, units: Sequence[Unit]) -> list[ShardInfo]:
        """Capture and write every unit that is not published; describe the shards of all."""
        self._total = sum(self._tokens(unit) for unit in units)
        if missing := [unit for unit in units if not self._path(unit).exists()]:
            text = f"{self.engine.identity} starts, {self.engine.dtype}; {len(missing)} of {len(units)} shards to write"
            self.emit(Note(stage=STAGE, text=text))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer") as writer:
            for unit in units:
                if self._path(unit).exists():
                    self._shards.append(writer.submit(self._published, unit))
                    self._advance(self._tokens(unit))
                    continue
                records = list(self._capture(unit))
                if self._shards:
                    self._shards[-1].result()
                self._shards.append(
                    writer.submit(write_shard, self.folder, unit.name, unit.split, self.contract, records)
                )
            shards = [shard.result() for shard in self._shards]
        self._report()
        return shards

    def _capture(self, unit: Unit) -> Iterator[Record]:
        samples = self._samples(unit)
        for sample, signal in zip(samples, self.engine.capture(samples), strict=True):
            yield to_record(sample, signal)
            self._advance(len(sample.response_ids))

    def _published(self, unit: Unit) -> ShardInfo:
        shard = ShardInfo.of(self._path(unit), contract=self.contract)
        if (shard.records, shard.split) != (len(unit), unit.split):
            raise StageError(
                f"{self._path(unit)} holds {shard.records} records of {shard.split}, the plan says {len(unit)}",
                hint="cache.records_per_shard must stay what it was when this set was begun",
            )
        return shard

    def _samples(self, unit: Unit) -> Sequence[Sample]:
        return unit.of(self.corpus.train if unit.split == "train" else self.corpus.dev)

    def _tokens(self, unit: Unit) -> int:
        return sum(len(sample.response_ids) for sample in self._samples(unit))

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.arrow"

    def _advance(self, tokens: int) -> None:
        self._done += tokens
        if self._done - self._reported >= self._total / _REPORTS:
            self._report()

    def _report(self) -> None:
        self._reported = self._done
        written = sum(shard.result().bytes for shard in self._shards if shard.done() and not shard.exception())
        self.emit(Progress(stage=STAGE, done=self._done, total=self._total, unit="response tokens", bytes=written))


def to_record(sample: Sample, signal: TeacherSignal) -> Record:
    """A sample and its signal as a row of a shard; row n predicts response token n."""
    return Record(
        sample_id=sample.sample_id,
        prompt_ids_P=sample.prompt_ids,
        response_ids_R=sample.response_ids,
        first_position=0,
        ids_NK=signal.ids_NK.to(torch.int32).numpy(),
        logprobs_NK=signal.logprobs_NK.numpy(),
        log_tail_N=signal.log_tail_N.numpy(),
        entropy_N=signal.entropy_N.numpy(),
        attention=None if signal.attention is None else _to_summary(signal.attention),
    )


def _to_summary(attention: AttentionSignal) -> AttentionSummary:
    return AttentionSummary(
        positions_LNM=attention.positions_LNM.numpy(),
        weights_LNM=attention.weights_LNM.numpy(),
        sink_LN=attention.sink_LN.numpy(),
        prompt_LN=attention.prompt_LN.numpy(),
        entropy_LN=attention.entropy_LN.numpy(),
    )


def _contract(
    corpus: Corpus,
    teacher: TeacherSettings,
    teacher_folder: Path,
    facts: TeacherFacts,
    spec: CaptureSpec,
    engine: TeacherEngine,
) -> Contract:
    tokenizer = tokenizer_fingerprint(teacher_folder)
    if tokenizer != corpus.tokenizer_fingerprint:
        raise StageError(
            "the corpus was tokenised with another tokenizer than the teacher's",
            hint="prepare the corpus again with this teacher",
        )
    attention = AttentionSpec(layers=spec.attention_layers, top_m=spec.attention_top_m)
    return Contract(
        codec=TopkPlanes1.name,
        teacher=teacher.model,
        teacher_fingerprint=weights_fingerprint(teacher_folder),
        tokenizer_fingerprint=tokenizer,
        vocab_size=facts.vocab_size,
        start_token_id=corpus.start_token_id,
        end_token_id=corpus.end_token_id,
        selection=Selection(kind="topk", k=spec.k),
        attention=attention if spec.attention_layers else None,
        corpus_fingerprint=corpus.fingerprint,
        engine=engine.identity,
        dtype=engine.dtype,
    )
