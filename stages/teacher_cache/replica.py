"""A copy of the teacher that captures one part of the plan at a time, and the one that does so in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from shards.record import AttentionSummary, Float32, Record
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Note
from stages.teacher_cache.engines.protocol import CaptureSpec, EngineFactory, TeacherEngine
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal

STAGE = "teacher-cache"
_LEAST_TOKENS = 64
"""A step's token budget below which memory is not what is missing."""


class ReplicaDied(Exception):
    """The process behind a replica is gone, and with it what it was working on. The text says what is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a contract says about the engine."""

    identity: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOrder:
    """Everything that it takes to make the engine, in any process."""

    factory: EngineFactory
    folder: Path
    teacher: TeacherSettings
    spec: CaptureSpec

    def make(self) -> TeacherEngine:
        return self.factory(self.folder, self.teacher, self.spec)


class Replica(Protocol):
    @property
    def name(self) -> str:
        """Which one it is, for the reader of the log: "replica 2 on node-7"."""

    def facts(self) -> EngineFacts:
        """What it runs; the teacher is not loaded for this. Raises StageError where it does not come up."""

    def start(self, wanted: Callable[[], bool]) -> bool:
        """Load the teacher, if it is not loaded; after a death, in a new process.

        Returns False where `wanted` says no before a device was free. Raises StageError where it does not come up.
        """

    def run(self, samples: Sequence[Sample]) -> Iterator[Record | Note]:
        """One record a sample, in order, each given out as soon as it is captured, and notes in between.

        Raises ReplicaDied, or StageError where the teacher cannot be captured faithfully, whoever tries.
        """

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[Record, Float32]]:
        """Each sample's record and the log-probabilities [N, V] of the same pass; see TeacherEngine.

        Raises ReplicaDied.
        """

    def close(self) -> None:
        """Stop what it runs, and give its memory back. From another thread, it makes a `run` in progress fail."""


class Spread(Protocol):
    """Decides how many replicas there are, and where."""

    def __call__(self, order: EngineOrder) -> Sequence[Replica]: ...


class InProcess:
    """The replica of this process. Out of memory, it goes on with half the token budget a step."""

    name = "the replica"

    def __init__(self, order: EngineOrder) -> None:
        self._order, self._engine = order, order.make()
        self._notes: list[Note] = []

    def facts(self) -> EngineFacts:
        return EngineFacts(identity=self._engine.identity, dtype=self._engine.dtype)

    def start(self, wanted: Callable[[], bool]) -> bool:
        while wanted():
            try:
                self._engine.start()
            except Exception as error:
                self._shrink(error)
            else:
                return True
        return False

    def run(self, samples: Sequence[Sample]) -> Iterator[Record | Note]:
        done = 0
        while done < len(samples):
            while self._notes:
                yield self._notes.pop(0)
            try:
                for signal in self._engine.capture(samples[done:]):
                    yield to_record(samples[done], signal)
                    done += 1
                assert done == len(samples), "an engine answers for every sample"
            except Exception as error:
                self._shrink(error)

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[Record, Float32]]:
        try:
            for sample, (signal, logprobs_NV) in zip(samples, self._engine.full(samples), strict=False):
                yield to_record(sample, signal), logprobs_NV.numpy()
        except Exception as error:
            # Whole distributions take more than a capture does, which is finished by now: no reason to fail it.
            if _is_out_of_memory(error):
                raise ReplicaDied(_first_line(error)) from error
            raise

    def close(self) -> None:
        self._engine.close()

    def _shrink(self, error: Exception) -> None:
        """Make the engine anew with half the token budget. Raises whatever is not a lack of memory."""
        if not _is_out_of_memory(error):
            raise error
        self._engine.close()
        budget = self._order.teacher.max_batched_tokens // 2
        if budget < _LEAST_TOKENS:
            raise StageError(
                f"the teacher does not fit the memory, even with {2 * budget} tokens a step: {_first_line(error)}",
                hint="raise teacher.tensor_parallel, or lower teacher.max_model_len",
            ) from error
        self._order = replace(self._order, teacher=replace(self._order.teacher, max_batched_tokens=budget))
        self._engine = self._order.make()
        text = f"out of memory: from here on a step has {budget} tokens, half of what it had"
        self._notes.append(Note(stage=STAGE, text=text, level="warning"))


def in_process(order: EngineOrder) -> list[Replica]:
    """One replica, in this process."""
    return [InProcess(order)]


def _is_out_of_memory(error: Exception) -> bool:
    """Tensor-parallel ranks report theirs as text."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def to_record(sample: Sample, signal: TeacherSignal) -> Record:
    """A sample and its signal as a row of a shard; row n predicts response token n."""
    return Record(
        sample_id=sample.sample_id,
        prompt_ids_P=sample.prompt_ids,
        response_ids_R=sample.response_ids,
        first_position=0,
        ids_NK=signal.ids_NK.to(torch.int32).numpy(),
        logprobs_NK=_array(signal.logprobs_NK),
        draws_NK=_array(signal.draws_NK),
        log_tail_N=signal.log_tail_N.numpy(),
        entropy_N=signal.entropy_N.numpy(),
        curve_NJ=_array(signal.curve_NJ),
        attention=None if signal.attention is None else _to_summary(signal.attention),
    )


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.numpy()


def _to_summary(attention: AttentionSignal) -> AttentionSummary:
    return AttentionSummary(
        positions_LNM=attention.positions_LNM.numpy(),
        weights_LNM=attention.weights_LNM.numpy(),
        sink_LN=attention.sink_LN.numpy(),
        prompt_LN=attention.prompt_LN.numpy(),
        entropy_LN=attention.entropy_LN.numpy(),
    )
