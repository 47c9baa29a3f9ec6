"""What stage one asks of whatever runs the teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from shards.contract import AttentionSpec, Selection
from stages.corpus.sample import Sample
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What is kept of each predicted position; the parts are those of a Contract."""

    selection: Selection
    curve: tuple[float, ...] = ()
    attention: AttentionSpec | None = None
    seed: int = 0
    """Decides what is drawn, together with the sample's id and the position."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CaptureSpec:
        """What `to_json` wrote."""
        raw = json.loads(text)
        attention = raw["attention"]
        if attention is not None:
            attention = AttentionSpec(**{**attention, "layers": tuple(attention["layers"])})
        return cls(
            selection=Selection(**raw["selection"]), curve=tuple(raw["curve"]), attention=attention, seed=raw["seed"]
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose attention is summarised, 0-based and rising; may be empty."""
        return () if self.attention is None else self.attention.layers

    def first_attention_row(self, prompt_length: int) -> int:
        """The first of a sample's rows whose attention is summarised; the head's first is row P-1."""
        whole = self.attention is not None and self.attention.rows == "all"
        return min(1, prompt_length - 1) if whole else prompt_length - 1


class TeacherEngine(Protocol):
    """Runs the teacher over prompts and responses. Making one is cheap: the teacher is loaded by `start`."""

    @property
    def identity(self) -> str:
        """Name and version, e.g. "vllm 0.32.0"."""

    @property
    def dtype(self) -> str:
        """Precision of body and head, e.g. "bfloat16+float32"."""

    def start(self) -> None:
        """Load the teacher, if it is not loaded. Raises StageError where it cannot be captured."""

    def capture(self, samples: Sequence[Sample]) -> Iterator[TeacherSignal]:
        """One signal a sample, in the order of `samples`, each given out as soon as it and those before it are done.

        Row n of a signal is the teacher's row P-1+n, which predicts response token n; where the attention of all rows
        is asked for, its rows are the teacher's from row 1 on: row 0 sees nothing but itself. Raises StageError where
        the teacher cannot be captured faithfully.
        """

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[TeacherSignal, Tensor]]:
        """The signal of each sample and the fp32 log-probabilities [N, V] that it was taken from, to measure by.

        Both are of one pass: another pass of a 16-bit body differs by more than a shard loses. Nothing where the engine
        cannot tell the log-probabilities.
        """

    def close(self) -> None:
        """Stop the engine and give its memory back."""


class EngineFactory(Protocol):
    def __call__(self, folder: Path, teacher: TeacherSettings, spec: CaptureSpec) -> TeacherEngine: ...
