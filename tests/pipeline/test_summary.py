"""The closing lines of a verb: made from facts, whatever these are."""

from __future__ import annotations

from pathlib import Path

from pipeline.run import RunFolder
from pipeline.summary import cache_lines


def test_a_stage_that_took_no_time_worth_telling_is_told_all_the_same() -> None:
    totals = {"shards": 1, "records": 2, "positions": 9, "bytes": 900}
    lines = cache_lines({**totals, "captured": 0, "seconds": 0.0}, RunFolder(Path("r")))
    assert lines[1] == "stage one  0 positions in 0 s: 0 response tokens/s, loading the teacher included"
