"""What stage one asks of whatever runs the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.corpus.sample import Sample
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import TeacherSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What is kept of each predicted position."""

    k: int
    """Ids kept."""
    attention_layers: tuple[int, ...]
    """Layers summarised, 0-based and rising; may be empty."""
    attention_top_m: int
    """Prompt keys kept a row and layer."""


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

        Row n of a signal is the teacher's row P-1+n, which predicts response token n. Raises StageError where the
        teacher cannot be captured faithfully.
        """

    def close(self) -> None:
        """Stop the engine and give its memory back."""


class EngineFactory(Protocol):
    def __call__(self, folder: Path, teacher: TeacherSettings, spec: CaptureSpec) -> TeacherEngine: ...
