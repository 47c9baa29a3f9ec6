"""The loop over the plan: units are captured by replicas and written by threads.

- A unit is captured by some replica, handed to a writer thread, and exists once its shard is published.
- A replica that dies starts anew and only what it held is redone; a record that no replica survives goes to its unit's
  rejects file, and the rest goes on.
- At most two units a replica are held in memory: the one being captured and the one being written.
- An exception on any side ends the loop and reaches the caller.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from shards.contract import Contract
from shards.record import Record
from shards.storage import Storage
from shards.units import Published, ShardInfo, describe, published_units
from shards.writer import write_shard
from stages.corpus.sample import Sample
from stages.corpus.store import Corpus
from stages.errors import StageError
from stages.events import Emit, Metric, Note, Progress
from stages.teacher_cache.plan import Unit
from stages.teacher_cache.rejects import publish_rejects, read_rejects
from stages.teacher_cache.replica import STAGE, Replica, ReplicaDied
from stages.teacher_cache.worklist import Complete, Part, WorkList

_REPORTS = 200
"""Progress events of a whole run, about."""


@dataclass(slots=True, kw_only=True)
class Job:
    """One run over the plan."""

    corpus: Corpus
    storage: Storage
    contract: Contract
    tables: bytes | None
    replicas: Sequence[Replica]
    emit: Emit
    _done: int = field(default=0, init=False)
    _total: int = field(default=0, init=False)
    _reported: int = field(default=0, init=False)
    _there: Mapping[str, str] = field(init=False)
    _rejected: Mapping[str, frozenset[str]] = field(init=False)
    _list: WorkList = field(init=False)
    _writers: ThreadPoolExecutor = field(init=False)
    _shards: list[Future[ShardInfo | None]] = field(default_factory=list, init=False)
    _rates: dict[int, float] = field(default_factory=dict, init=False)
    _talking: threading.RLock = field(default_factory=threading.RLock, init=False)

    def run(self, units: Sequence[Unit]) -> list[ShardInfo]:
        """Capture and write every unit that is not published; describe the shards of all."""
        self._there, self._rejected = published_units(self.storage), read_rejects(self.storage)
        missing = {unit: self._wanted(unit) for unit in units if unit.name not in self._there}
        self._list = WorkList((unit, wanted) for unit, wanted in missing.items() if wanted)
        self._total = sum(self._tokens(unit, range(unit.start, unit.stop)) for unit in units)
        self._done = self._total - sum(self._tokens(unit, wanted) for unit, wanted in missing.items())
        if missing:
            self._say(self._opening(len(missing), len(units)))
        writers = min(len(self.replicas), os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=writers, thread_name_prefix="shard-writer") as self._writers:
            for unit in units:
                if unit not in missing:
                    self._keep(self._writers.submit(self._published, unit))
            try:
                self._work_all()
            finally:
                self._list.abandon()
            shards = [shard.result() for shard in self._shards]
        self._report()
        return [shard for shard in shards if shard is not None]

    def _opening(self, missing: int, units: int) -> str:
        facts, count = self.replicas[0].facts(), len(self.replicas)
        who = facts.identity if count == 1 else f"{count} replicas of {facts.identity}"
        return f"{who} start{'s' * (count == 1)}, {facts.dtype}; {missing} of {units} shards to write"

    def _keep(self, shard: Future[ShardInfo | None]) -> Future[ShardInfo | None]:
        """Remember what becomes of a shard; where it fails, nothing more is begun."""
        self._shards.append(shard)
        shard.add_done_callback(lambda done: self._list.abandon() if done.exception() else None)
        return shard

    def _work_all(self) -> None:
        """One replica works in this thread, which Ctrl-C can reach; each of several is waited for in its own."""
        if len(self.replicas) == 1:
            self._work(self.replicas[0])
            return
        with ThreadPoolExecutor(max_workers=len(self.replicas), thread_name_prefix="replica") as pool:
            working = [pool.submit(self._work, replica) for replica in self.replicas]
            try:
                done, _ = wait(working, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._list.abandon()
                for replica in self.replicas:
                    replica.close()
                raise

    def _work(self, replica: Replica) -> None:
        """Capture part after part with one replica; its next unit waits until its last one is written."""
        writing: Future[ShardInfo | None] | None = None
        while replica.start(self._list.is_open) and (part := self._list.take()):
            began = time.monotonic()
            complete = self._capture(replica, part)
            self._measure(replica, self._tokens(part.unit, part.indices) / (time.monotonic() - began))
            if complete is not None:
                if writing is not None:
                    writing.result()
                writing = self._keep(self._writers.submit(self._write, complete))

    def _capture(self, replica: Replica, part: Part) -> Complete | None:
        """The part's unit where that is complete now, be it that this part is rejected."""
        split, records = self._split(part.unit), list[Record]()
        try:
            for said in replica.run([split[index] for index in part.indices]):
                if isinstance(said, Note):
                    self._say(f"{replica.name}: {said.text}", said.level)
                else:
                    records.append(said)
                    self._advance(len(said.response_ids_R))
        except ReplicaDied as death:
            self._advance(-sum(len(record.response_ids_R) for record in records))
            if self._list.is_open():  # else it was stopped, which is no news
                self._say(f"{replica.name} died over {_named(part)} and starts anew: {death}", "warning")
            return self._list.died(part, str(death))
        return self._list.finish(part, records)

    def _write(self, complete: Complete) -> ShardInfo | None:
        """Publish a unit; None where nothing of it is left."""
        unit, split = complete.unit, self._split(complete.unit)
        if complete.rejects:
            publish_rejects(self.storage, unit, complete.rejects, split)
            names = ", ".join(split[reject.index].sample_id for reject in complete.rejects)
            self._say(f"{unit.name}: no replica survived {names}: rejected, the rest goes on", "warning")
            self._advance(self._tokens(unit, (reject.index for reject in complete.rejects)))
        if not complete.records:
            return None
        info = write_shard(self.storage, unit.name, unit.split, self.contract, complete.records, tables=self.tables)
        # Of several writers in one place another may have been first, perhaps with units of another size.
        return self._holding(unit, describe(self.storage, info.name, self.contract, sha256=info.sha256))

    def _published(self, unit: Unit) -> ShardInfo:
        """A shard that was there before."""
        return self._holding(unit, describe(self.storage, self._there[unit.name], self.contract))

    def _holding(self, unit: Unit, shard: Published) -> ShardInfo:
        """The shard, if it holds this unit, be it without rejected records. Raises StageError for any other."""
        ids, split = set(shard.columns.column("sample_id").to_pylist()), self._split(unit)
        planned = {split[index].sample_id for index in range(unit.start, unit.stop)}
        missing = planned - ids
        if ids - planned or (missing and missing - read_rejects(self.storage).get(unit.name, frozenset())):
            raise StageError(
                f"{self.storage.where(shard.info.name)} holds {len(ids)} records, which are not the {len(planned)} of "
                "the plan",
                hint="cache.records_per_shard must stay what it was when this set was begun",
            )
        return shard.info

    def _wanted(self, unit: Unit) -> list[int]:
        """The places of a unit's samples, without those that were rejected before."""
        rejected, split = self._rejected.get(unit.name), self._split(unit)
        return [i for i in range(unit.start, unit.stop) if not rejected or split[i].sample_id not in rejected]

    def _split(self, unit: Unit) -> Sequence[Sample]:
        return self.corpus.splits[unit.split]

    def _tokens(self, unit: Unit, indices: Iterable[int]) -> int:
        split = self._split(unit)
        return sum(len(split[index].response_ids) for index in indices)

    def _advance(self, tokens: int) -> None:
        with self._talking:
            self._done += tokens
            if self._done - self._reported >= self._total / _REPORTS:
                self._report()

    def _report(self) -> None:
        with self._talking:
            self._reported = self._done
            written = sum(info.bytes for shard in list(self._shards) if (info := _outcome(shard)))
            self.emit(Progress(stage=STAGE, done=self._done, total=self._total, unit="response tokens", bytes=written))

    def _measure(self, replica: Replica, rate: float) -> None:
        """Several replicas each have a speed, so that one that lags is seen."""
        with self._talking:
            self._rates[self.replicas.index(replica)] = rate
            if len(self.replicas) > 1:
                values = {f"replica_{number}_tokens_per_s": speed for number, speed in sorted(self._rates.items())}
                self.emit(Metric(stage=STAGE, step=len(self._shards), values=values))

    def _say(self, text: str, level: str = "info") -> None:
        with self._talking:
            self.emit(Note(stage=STAGE, text=text, level=level))


def _outcome(shard: Future[ShardInfo | None]) -> ShardInfo | None:
    return shard.result() if shard.done() and not shard.exception() else None


def _named(part: Part) -> str:
    first, last = part.indices[0], part.indices[-1]
    if part.whole:
        return part.unit.name
    return f"{part.unit.name}, " + (f"record {first}" if first == last else f"records {first} to {last}")
