"""The run folder: one writer, a recipe that what was made from it holds fast, facts by stage."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.recipe import load
from pipeline.run import RunFolder
from pipeline.steps import place_of

HOLD = """
import sys, time
from pathlib import Path
from pipeline.run import RunFolder
with RunFolder(Path(sys.argv[1])).lock("distill"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "r")


def test_a_busy_run_is_refused_and_a_killed_holder_lets_go(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(PipelineError, match=f"`distill`, process {holder.pid}"), run.lock("teacher-cache"):
        pytest.fail("the lock was given twice")
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    with run.lock("teacher-cache"):
        assert time.monotonic() < deadline


def test_a_recipe_may_change_until_the_stage_that_uses_it_has_begun(run: RunFolder) -> None:
    run.adopt(load("smollm2-demo"))
    run.adopt(load("smollm2-demo", ["cache.k=8"]))
    assert run.recipe().cache.k == 8

    run.shards.mkdir()
    (run.shards / "contract.json").touch()
    with pytest.raises(PipelineError, match=r"cache\.k = 8, not 16"):
        run.adopt(load("smollm2-demo", ["cache.k=16"]))
    run.adopt(load("smollm2-demo", ["cache.k=8", "distill.epochs=7"]))
    assert run.recipe().distill.epochs == 7

    run.checkpoints.mkdir()
    with pytest.raises(PipelineError, match=r"distill\.epochs = 7, not 1") as refused:
        run.adopt(load("smollm2-demo", ["cache.k=8"]))
    assert f"NAME=… SHARDS={run.shards} " in refused.value.hint, "days of stage one are not to be thrown away"
    run.adopt(load("smollm2-demo", ["cache.k=8", "distill.epochs=7", "distill.keep_checkpoints=9"]))


def test_a_folder_that_is_no_run_is_named(run: RunFolder) -> None:
    with pytest.raises(PipelineError, match="is not a run"):
        run.recipe()


def test_facts_are_kept_by_stage(run: RunFolder) -> None:
    run.report("teacher_cache", {"records": 3})
    run.report("distill", {"steps": 5})
    run.report("teacher_cache", {"records": 4})
    assert run.summary() == {"teacher_cache": {"records": 4}, "distill": {"steps": 5}}
    assert [path.name for path in run.path.iterdir()] == ["summary.json"]


def test_stage_one_writes_to_the_run_a_folder_or_a_store_and_nowhere_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert place_of(run, None) == run.shards
    assert place_of(run, "elsewhere") == Path("elsewhere")
    assert place_of(run, "gs://bucket/set") == "gs://bucket/set"
    with pytest.raises(UsageError, match="ftp://"):
        place_of(run, "ftp://host/set")
