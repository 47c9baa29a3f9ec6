"""Records that no replica survived, beside the shard that lacks them: UNIT.rejects-N.jsonl, one JSON object a line.

    {"sample_id": the record, "split": its split, "index": its place there, "reason": what was known of the last death}

Published before the shard, so that no shard is short of a record without a word on which and why. N counts from 1: a
run that was stopped between the two and finds more to reject adds a file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from shards.durable import publish
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.teacher_cache.plan import Unit
from stages.teacher_cache.worklist import Reject


def publish_rejects(folder: Path, unit: Unit, rejects: Sequence[Reject], samples: Sequence[Sample]) -> None:
    """Publish what became known of a unit in this run; `samples` are its split's."""
    lines = [
        {
            "sample_id": samples[reject.index].sample_id,
            "split": unit.split,
            "index": reject.index,
            "reason": reject.reason,
        }
        for reject in rejects
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    names = (_name(unit, number) for number in itertools.count(1))
    next(name for name in names if publish(folder, name, content))


def read_rejects(folder: Path, unit: Unit) -> frozenset[str]:
    """The ids of a unit's rejected samples. Raises StageError where a file is not what was published."""
    found: set[str] = set()
    for number in itertools.count(1):
        path = folder / _name(unit, number)
        try:
            found.update(json.loads(line)["sample_id"] for line in path.read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            break
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{path} is damaged: {error!r}", hint="delete it: its records are tried again") from error
    return frozenset(found)


def _name(unit: Unit, number: int) -> str:
    return f"{unit.name}.rejects-{number}.jsonl"
