"""What must be the same for a stopped run to go on: shards, tokenizer, recipe, precision, by flat names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from shards.reader import ShardSet
from shards.units import shard_name, unit_of
from stages.distill.settings import FREE_SETTINGS, DistillSettings, ObjectiveSettings
from stages.student.shape import StudentShape

SHARDS_SHA256 = "shards.sha256"


def shards_sha256(shards: ShardSet) -> str:
    """Of all that a set holds, wherever it lies: a copy in an object store has other file names, but the same units."""
    shards_of_units = shards.manifest.shards
    contents = [(shard_name(unit_of(info), info.sha256, exclusive=True), info.sha256) for info in shards_of_units]
    files = sorted(shards.manifest.teacher_files.items())
    return hashlib.sha256(json.dumps([contents, files]).encode()).hexdigest()


def identity_of(
    shards: ShardSet, settings: DistillSettings, objective: ObjectiveSettings, shape: StudentShape, precision: str
) -> dict[str, Any]:
    """`precision` is the resolved one: "auto" may mean another on another machine."""
    contract = json.loads(shards.contract.to_json())
    bound = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_SETTINGS}
    return {
        **{f"contract.{name}": value for name, value in contract.items()},
        SHARDS_SHA256: shards_sha256(shards),
        **{f"distill.{name}": value for name, value in bound.items()},
        **{f"objective.{name}": value for name, value in dataclasses.asdict(objective).items()},
        **{f"student.{name}": value for name, value in dataclasses.asdict(shape).items()},
        "precision": precision,
    }
