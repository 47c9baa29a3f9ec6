"""Runs as they are listed: the state is the lock's and the last turn's word, the figures are the newest of the log."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.event_log import EventLog
from pipeline.run import RunFolder
from pipeline.runs import RunFacts, find_run, list_runs, run_facts, run_lines
from pipeline.runs import finished_run as find_finished
from pipeline.serving import _table
from stages.events import Metric, Progress

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
    run = RunFolder(tmp_path / "runs" / "r")
    log = EventLog(run.events)
    log(Metric(stage="distill", step=4, values={"kl": 2.5}))
    log(Metric(stage="distill", step=4, values={"val_kl": 2.25}))
    log(Progress(stage="distill", done=4, total=10, unit="steps"))
    log.close()
    return run


@pytest.fixture
def hold(run: RunFolder) -> Callable[[], subprocess.Popen[str]]:
    def start() -> subprocess.Popen[str]:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    return start


def test_a_held_run_is_running_and_a_killed_holder_has_failed(
    run: RunFolder, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    holder = hold()
    assert (run_facts(run).state, run_facts(run).verb) == ("running", "distill")
    holder.kill()
    holder.wait()
    facts = run_facts(run)
    assert facts.state == "failed"
    assert f"process {holder.pid} vanished" in facts.message


def test_an_interrupted_turn_is_stopped(run: RunFolder, hold: Callable[[], subprocess.Popen[str]]) -> None:
    holder = hold()
    holder.send_signal(signal.SIGINT)
    holder.wait()
    assert (run_facts(run).state, run_facts(run).message) == ("stopped", "run `distill` again to go on")


def test_a_turn_that_raised_has_failed_with_its_words(run: RunFolder) -> None:
    with pytest.raises(PipelineError), run.lock("teacher-cache"):
        raise PipelineError("the teacher is too large")
    assert (run_facts(run).state, run_facts(run).message) == ("failed", "the teacher is too large")


def test_a_distillation_that_was_asked_to_stop_is_stopped_until_it_has_finished(run: RunFolder) -> None:
    for finished, state in ((False, "stopped"), (True, "finished")):
        with run.lock("distill"):
            run.report("distill", {"finished": finished})
        assert run_facts(run).state == state


def test_progress_of_an_earlier_verb_is_not_taken_for_this_ones(run: RunFolder) -> None:
    assert run_facts(run).done == 4
    time.sleep(0.01)
    with run.lock("evaluate"):
        assert run_facts(run).done is None
    assert run_facts(run).kl == 2.5


def test_looking_at_a_run_never_keeps_a_verb_from_beginning(run: RunFolder) -> None:
    look = "from pathlib import Path; from pipeline.turn import is_held\nwhile True: is_held(Path(sys.argv[1]))"
    with run.lock("prepare"):
        pass
    lookers = [subprocess.Popen([sys.executable, "-c", "import sys; " + look, str(run.path)]) for _ in range(2)]
    try:
        time.sleep(0.5)
        for _ in range(100):
            with run.lock("prepare"):
                pass
    finally:
        for looker in lookers:
            looker.kill()
            looker.wait()


def test_facts_are_json_and_survive_damaged_files(run: RunFolder) -> None:
    run.summary_file.write_text("{half", encoding="utf-8")
    run.recipe_file.write_text("name = [", encoding="utf-8")
    (run.path / ".lock").write_text("{", encoding="utf-8")
    with run.events.open("a", encoding="utf-8") as file:
        file.write('{"time": 1, "kind": "metric", "stage": "distill", "step": 5, "values": {"kl": NaN}}\n{"ti')
    (facts,) = list_runs(run.path.parent)
    assert RunFacts(**json.loads(json.dumps(dataclasses.asdict(facts), allow_nan=False))) == facts
    assert (facts.step, facts.kl, facts.validation_kl, facts.teacher) == (5, None, 2.25, "")


def test_the_running_or_else_the_newest_run_is_meant_by_default(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("older", "newer"):
        log = EventLog(root / name / "events.jsonl")
        log(Progress(stage="s", done=1, total=1, unit="rows"))
        time.sleep(0.01)
    (root / "no-run").mkdir()
    assert [facts.name for facts in list_runs(root)] == ["newer", "older"]
    assert find_run(None, root).path.name == "newer"
    with RunFolder(root / "older").lock("distill"):
        assert find_run(None, root).path.name == "older"
    assert find_run("newer", root) == find_run(str(root / "newer"), tmp_path)
    with pytest.raises(PipelineError, match="no run 'other'") as caught:
        find_run("other", root)
    assert "newer, older" in caught.value.hint
    for folder in ("no-run", str(tmp_path)):
        with pytest.raises(PipelineError, match="no run "):
            find_run(folder, root)
    with pytest.raises(PipelineError, match="no run under"):
        find_run(None, tmp_path / "nothing")


def test_a_finished_run_is_found_as_any_run_is_and_must_have_a_model(
    run: RunFolder, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = finished_run.parent
    assert root == run.path.parent
    with pytest.raises(PipelineError, match=r"r has no final model yet"):
        find_finished("r", root)
    with pytest.raises(PipelineError, match="no run 'typo'") as caught:
        find_finished("typo", root)
    assert caught.value.hint in ("there is r, tiny", "there is tiny, r")
    for name in (None, "tiny", str(finished_run)):
        assert find_finished(name, root).path == finished_run
    given = root / "given" / "final_model"
    shutil.copytree(finished_run / "final_model", given)
    assert find_finished("given", root).final_model == given, "a model that was copied here, without its run"
    monkeypatch.chdir(root.parent)
    table = {"tiny": Path("runs/tiny/final_model"), "m": given}
    assert _table(["runs/tiny", f"m={given}"]) == table


def test_the_table_has_a_line_a_run(run: RunFolder) -> None:
    heading, line = run_lines([run_facts(run)])
    assert heading.split() == ["run", "state", "verb", "progress", "KL", "val.", "KL", "last", "said"]
    assert line.split()[:7] == ["r", "stopped", "?", "40%", "distill", "2.500", "2.250"]
