"""Records that no replica survived, beside the shard that lacks them: UNIT.rejects-N.jsonl, one JSON object a line.

    {"sample_id": the record, "split": its split, "index": its place there, "reason": what was known of the last death}

Published before the shard, so that no shard is short of a record without a word on which and why. N counts from 1: a
run that was stopped between the two and finds more to reject adds a file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from shards.storage import Storage
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.teacher_cache.plan import Unit
from stages.teacher_cache.worklist import Reject

_NAME = re.compile(r"(?P<unit>.+)\.rejects-[0-9]+\.jsonl")
_MOST_BYTES = 1 << 28


def publish_rejects(storage: Storage, unit: Unit, rejects: Sequence[Reject], samples: Sequence[Sample]) -> None:
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
    names = (f"{unit.name}.rejects-{number}.jsonl" for number in itertools.count(1))
    next(name for name in names if storage.publish(name, content))


def read_rejects(storage: Storage) -> Mapping[str, frozenset[str]]:
    """The ids of each unit's rejected samples, by its name. Raises StageError for a file that was not published so."""
    found: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for name in storage.names():
        if named := _NAME.fullmatch(name):
            try:
                lines = storage.read(name, most=_MOST_BYTES).decode().splitlines()
                found[named["unit"]] |= {json.loads(line)["sample_id"] for line in lines}
            except (ValueError, KeyError, TypeError) as error:
                hint = "delete it: its records are tried again"
                raise StageError(f"{storage.where(name)} is damaged: {error!r}", hint=hint) from error
    return found
