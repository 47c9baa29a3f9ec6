"""Stage one on many devices: replicas of the teacher as Ray actors. The one place that knows Ray.

- `RAY_ADDRESS` names a cluster; without it Ray runs on this machine alone, for the time of the stage.
- A replica takes as many GPUs as a tensor-parallel group has; without GPUs it takes its share of the cores.
- Ray restarts nothing by itself: which part of the plan a dead replica held is the stage's to know.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pipeline.errors import PipelineError
from pipeline.launch import Machine, count_replicas, device_memory
from shards.errors import ShardError
from shards.record import Float32, Record
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Note
from stages.teacher_cache.preflight import Devices
from stages.teacher_cache.replica import STAGE, EngineFacts, EngineOrder, InProcess, ReplicaDied, Spread, in_process

ADDRESS = "RAY_ADDRESS"
_STARTS = 3
"""Times in a row that a replica may die before it has loaded the teacher."""
_POLL_S = 1.0
_PATIENCE_S = 600.0
"""How long the first replica may wait for its devices."""
_ANSWER_S = 10.0
"""Within which a cluster's head must answer."""
_OBJECT_STORE_BYTES = 1 << 30
"""Records on their way; each is taken out at once."""
_COME_UP = "see that the teacher fits the memory of a replica's devices, and that every host can read its folder"
_DETAIL = re.compile(r"Worker exit type: (\w+) Worker exit detail: ([^.]+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What an actor is given."""

    gpus: int
    cores: int
    pinned: tuple[int, ...]
    """The cores that it keeps to; empty where Ray's host is not this one."""


class _Host:
    """The actor: an in-process replica in a process of its own."""

    def __init__(self, order: EngineOrder, place: _Place) -> None:
        if place.pinned:
            os.sched_setaffinity(0, place.pinned)
        self._order = order

    @cached_property
    def _replica(self) -> InProcess:
        """Made by the first call: what a constructor raises, Ray tells as a death and not as what it was."""
        return InProcess(self._order)

    def facts(self) -> EngineFacts:
        return self._replica.facts()

    def start(self) -> str:
        self._replica.start(lambda: True)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def run(self, samples: Sequence[Sample]) -> Iterator[Record | Note]:
        yield from self._replica.run(samples)

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[Record, Float32]]:
        yield from self._replica.full(samples)


class RayReplica:
    """A Replica whose process may die: it is made anew when it is started again."""

    def __init__(self, number: int, order: EngineOrder, place: _Place) -> None:
        self.name = f"replica {number}"
        self._title, self._order, self._place = self.name, order, place
        self._actor: Any = None
        self._notes: list[Note] = []

    def facts(self) -> EngineFacts:
        try:
            facts: EngineFacts = ray.get(self._living().facts.remote(), timeout=_PATIENCE_S)
        except GetTimeoutError as error:
            raise StageError(
                f"{self.name} has waited {_PATIENCE_S / 60:.0f} minutes for its devices",
                hint="`.venv/bin/ray status` says what the cluster has and who holds it",
            ) from error
        except RayError as error:
            failure = self._explained(error)
            if isinstance(failure, ReplicaDied):
                failure = StageError(f"{self.name} died before it had said what it runs: {failure}", hint=_COME_UP)
            raise failure from error
        return facts

    def start(self, wanted: Callable[[], bool]) -> bool:
        for _ in range(_STARTS):
            if not wanted():
                return False
            try:
                loading = self._living().start.remote()
                while wanted():
                    if ray.wait([loading], timeout=_POLL_S)[0]:
                        self.name = f"{self._title} ({ray.get(loading)})"
                        return True
                return False
            except RayError as error:
                failure = self._explained(error)
                if not isinstance(failure, ReplicaDied):
                    raise failure from error
                text = f"died while it loaded the teacher, and starts anew: {failure}"
                self._notes.append(Note(stage=STAGE, text=text, level="warning"))
        raise StageError(
            f"{self._title} died {_STARTS} times before it had loaded the teacher: {failure}",
            hint=_COME_UP,
        )

    def run(self, samples: Sequence[Sample]) -> Iterator[Record | Note]:
        while self._notes:
            yield self._notes.pop(0)
        yield from self._streamed(self._living().run.remote(samples))

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[Record, Float32]]:
        yield from self._streamed(self._living().full.remote(samples))

    def _streamed(self, references: Any) -> Iterator[Any]:
        try:
            for reference in references:
                yield ray.get(reference)
        except RayError as error:
            raise self._explained(error) from error

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _living(self) -> Any:
        if self._actor is None:
            options = ray.remote(_Host).options(
                num_gpus=self._place.gpus,
                num_cpus=self._place.cores,
                max_restarts=0,
                scheduling_strategy="SPREAD",
            )
            self._actor = options.remote(self._order, self._place)
        return self._actor

    def _explained(self, error: RayError) -> Exception:
        """The stage's own error, or ReplicaDied: whatever else an engine raises, its process is not to be trusted."""
        self.close()
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, StageError | ShardError):
                return error.cause
            return ReplicaDied(f"{type(error.cause).__name__}: {error.cause}")
        return ReplicaDied(_reason(error))


def _reason(error: RayError) -> str:
    """Ray's account of a death, in a few words; where it has none yet, the connection to the process is gone."""
    found = _DETAIL.search(str(error))
    if found is None or found[1] == "SYSTEM_ERROR":
        return "its process was killed or crashed"
    return f"{found[2]} ({found[1]})"


@contextmanager
def replicas(gpus: int | None, tensor_parallel: int, here: Machine, sizes: Sequence[int]) -> Iterator[Spread]:
    """The replicas that `gpus` devices make, for the time of a stage: one alone runs in this process.

    Raises UsageError where that count cannot work: see `count_replicas`.
    """
    if ADDRESS not in os.environ:
        count = count_replicas(gpus, tensor_parallel, here, sizes)
        if count == 1:
            yield in_process
            return
        with _ray(num_cpus=max(count, here.cores), num_gpus=here.gpus, object_store_memory=_OBJECT_STORE_BYTES):
            yield _spread(count, tensor_parallel, here)
        return
    with _ray():
        there = _cluster()
        count = count_replicas(gpus, tensor_parallel, there, sizes)
        yield _spread(count, tensor_parallel, there)


def planned(gpus: int | None, tensor_parallel: int, here: Machine, sizes: Sequence[int]) -> Devices:
    """What `replicas` would make of it, and nothing is made. Raises UsageError as it does."""
    if ADDRESS not in os.environ:
        count = count_replicas(gpus, tensor_parallel, here, sizes)
        return Devices(replicas=count, memory=device_memory(here, count * tensor_parallel), gpus=here.gpus > 0)
    with _ray():
        there = _cluster()
    return Devices(replicas=count_replicas(gpus, tensor_parallel, there, sizes), memory=None, gpus=there.gpus > 0)


def _cluster() -> Machine:
    held = ray.cluster_resources()
    return Machine(gpus=int(held.get("GPU", 0)), cores=int(held.get("CPU", 1)))


def _spread(count: int, tensor_parallel: int, there: Machine) -> Spread:
    return lambda order: [
        RayReplica(number, order, _place(number, count, tensor_parallel, there)) for number in range(count)
    ]


@contextmanager
def _ray(**local: Any) -> Iterator[None]:
    address = os.environ.get(ADDRESS, "local")
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "/" not in host:
            # Ray itself would try for two minutes before it says that nobody answers.
            socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
        ray.init(
            address=address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PipelineError(
            f"Ray at {address} is not there: {error}" if not local else f"Ray did not start: {error}",
            hint="one copy of the teacher does without Ray: as many GPUS as TP"
            if local
            else f"start it with `.venv/bin/ray start --head`, or unset {ADDRESS}",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _place(number: int, count: int, tensor_parallel: int, here: Machine) -> _Place:
    if here.gpus:
        return _Place(gpus=tensor_parallel, cores=1, pinned=())
    share = max(1, here.cores // count)
    if os.environ.get(ADDRESS):
        return _Place(gpus=0, cores=share, pinned=())
    cores = sorted(os.sched_getaffinity(0))
    first = number * share % len(cores)
    return _Place(gpus=0, cores=share, pinned=tuple(cores[first : first + share]))
