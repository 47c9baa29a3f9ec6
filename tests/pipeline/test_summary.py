"""The closing lines of a verb say where things are and what its figures are."""

from __future__ import annotations

from pathlib import Path

from pipeline.run import RunFolder
from pipeline.summary import cache_lines, distill_lines


def test_a_stage_that_took_no_time_worth_telling_is_told_all_the_same() -> None:
    totals = {"shards": 1, "records": 2, "positions": 9, "bytes": 900}
    lines = cache_lines({**totals, "captured": 0, "seconds": 0.0, "where": "r/shards"})
    assert lines[1] == "stage one  0 positions in 0 s: 0 response tokens/s, loading the teacher included"


def test_a_cache_that_was_written_elsewhere_is_named_where_it_is(finished_run: Path) -> None:
    facts = {**RunFolder(finished_run).summary()["teacher_cache"], "where": "s3://bucket/set"}
    assert cache_lines(facts)[-1].strip() == "s3://bucket/set"


def test_the_kl_is_what_the_set_lets_it_be(finished_run: Path) -> None:
    run = RunFolder(finished_run)
    facts = {**run.summary()["distill"], "kl_is": "as the drawn ids estimate it"}
    told = " ".join(distill_lines(facts, run))
    assert "KL as the drawn ids estimate it" in told
    assert "rest" not in told
