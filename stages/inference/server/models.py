"""The students that a server offers: a table that is fixed when it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shards.durable import file_sha256
from stages.errors import StageError
from stages.inference.generate import Student

NAME = re.compile(r"[a-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A student under the name by which requests ask for it."""

    name: str
    student: Student
    fingerprint: str
    """Of the weights."""
    created: int
    """When they were written, in seconds since 1970."""

    @classmethod
    def load(cls, name: str, folder: Path) -> ServedModel:
        """Raises StageError where the folder holds no student, or the name is none."""
        if not NAME.fullmatch(name):
            raise StageError(f"{name!r} cannot name a served model", hint="use a-z, 0-9, '.', '_' and '-'")
        student = Student.load(folder)
        weights = folder / "model.safetensors"
        fingerprint, created = f"fp_{file_sha256(weights)[:12]}", int(weights.stat().st_mtime)
        return cls(name=name, student=student, fingerprint=fingerprint, created=created)
