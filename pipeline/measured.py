"""What was measured of the student that lies in a run now: figures of weights that lay there before are left out."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.run import ELSEWHERE, RunFolder
from shards.durable import file_sha256


def summary_of_this_model(run: RunFolder) -> dict[str, Any]:
    """What the stages have reported, but of evaluations those alone that measured the weights that lie there now."""
    summary, here = run.summary(), model_sha256(run)
    if _measured(summary.get("evaluate", {})) != here:
        summary.pop("evaluate", None)
    elsewhere = summary.get(ELSEWHERE, {})
    summary[ELSEWHERE] = {where: facts for where, facts in elsewhere.items() if _measured(facts) == here}
    return summary


def _measured(facts: dict[str, Any]) -> str | None:
    sha256: str | None = facts.get("made_from", {}).get("model_sha256")
    return sha256


def model_sha256(run: RunFolder) -> str:
    """Of the finished weights; empty where there are none."""
    weights = run.final_model / "model.safetensors"
    if not weights.is_file():
        return ""
    stat = weights.stat()
    return _sha256(weights, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=16)
def _sha256(path: Path, _state: tuple[int, int]) -> str:
    """Read once as long as the file stays what it was: a monitor asks every second."""
    return file_sha256(path)
