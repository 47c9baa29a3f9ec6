"""What must be the same for a stopped run to go on: shards, tokenizer, recipe, precision, by flat names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from shards.reader import ShardSet
from stages.distill.settings import FREE_SETTINGS, DistillSettings, ObjectiveSettings
from stages.student.shape import StudentShape


def identity_of(
    shards: ShardSet, settings: DistillSettings, objective: ObjectiveSettings, shape: StudentShape, precision: str
) -> dict[str, Any]:
    """`precision` is the resolved one: "auto" may mean another on another machine."""
    contract = json.loads(shards.contract.to_json())
    contents = [(shard.name, shard.sha256) for shard in shards.manifest.shards]
    files = sorted(shards.manifest.teacher_files.items())
    bound = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_SETTINGS}
    return {
        **{f"contract.{name}": value for name, value in contract.items()},
        "shards.sha256": hashlib.sha256(json.dumps([contents, files]).encode()).hexdigest(),
        **{f"distill.{name}": value for name, value in bound.items()},
        **{f"objective.{name}": value for name, value in dataclasses.asdict(objective).items()},
        **{f"student.{name}": value for name, value in dataclasses.asdict(shape).items()},
        "precision": precision,
    }
