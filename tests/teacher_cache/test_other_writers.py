"""Another writer's shards in the same place: they are taken for one's own where they hold the same samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shards.manifest import is_sealed
from stages.errors import StageError
from stages.teacher_cache import job as job_module


def test_units_of_another_size_are_refused(tmp_path: Path, recorded: ModuleType, recorded_teacher: Path) -> None:
    def stop_at_5(sample: object) -> None:
        if sample.sample_id == f"{5:016x}":  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded.fill(tmp_path, recorded_teacher, before=stop_at_5)
    with pytest.raises(StageError, match="holds 4 records") as refused:
        recorded.fill(tmp_path, recorded_teacher, cache=dataclasses.replace(recorded.CACHE, records_per_shard=5))
    assert "records_per_shard" in refused.value.hint


def test_W3_units_of_another_size_that_arrive_meanwhile_are_refused(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer in the same place with six records a shard: its second unit holds the last sample alone."""
    write = job_module.write_shard

    def second(
        folder: Path, name: str, split: str, contract: object, records: Sequence[object], **named: object
    ) -> object:
        if name == "train-00001":
            write(folder, name, split, contract, records[-1:], **named)  # type: ignore[arg-type]
        return write(folder, name, split, contract, records, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(job_module, "write_shard", second)
    with pytest.raises(StageError, match="holds 1 records, which are not the 3 of the plan"):
        recorded.fill(tmp_path, recorded_teacher)
    assert not is_sealed(tmp_path)


def test_what_another_writer_rejected_meanwhile_is_no_lack(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = job_module.write_shard

    def second(folder: Path, name: str, *rest: Any, **named: object) -> object:
        if name == "train-00001":
            (tmp_path / f"{name}.rejects-1.jsonl").write_text(json.dumps({"sample_id": f"{4:016x}"}) + "\n")
            write(folder, name, *rest[:-1], rest[-1][1:], **named)  # type: ignore[arg-type]
        return write(folder, name, *rest, **named)

    monkeypatch.setattr(job_module, "write_shard", second)
    assert [shard.records for shard in recorded.fill(tmp_path, recorded_teacher).shards] == [2, 4, 2]
