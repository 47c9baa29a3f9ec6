"""Stage two as it is launched: signals, machines of a hostfile, a screen session, trackers; with real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import launch, rank, steps
from pipeline.errors import PipelineError, UsageError
from pipeline.hosts import check_hosts, read_hosts
from pipeline.recipe import load
from pipeline.run import RunFolder
from pipeline.runs import run_facts
from pipeline.summary import distill_lines
from pipeline.trackers import require_tracker, sinks
from stages.distill.train import TrainResult
from stages.errors import StageError
from stages.events import Metric, Note, silent

ROOT = Path(__file__).resolve().parent.parent.parent
CLI = [sys.executable, str(ROOT / "cli.py")]
ENDLESS = "distill.epochs=100000"
SMALL = [
    *("--recipe", "smollm2-demo", "--set", "distill.global_batch=4", "--set", "distill.checkpoint_every=100000"),
    *("--set", "student.hidden_size=32", "--set", "student.heads=2", "--set", "student.encoder_layers=1"),
    *("--set", "objective.temperature_mode=fixed", "--set", "objective.temperature=1.0"),  # these shards have no curve
]


@pytest.fixture
def user(finished_run: Path) -> Path:
    """A user's folder with shards in runs/tiny and nothing trained yet."""
    for left in ("final_model", "checkpoints"):
        shutil.rmtree(finished_run / left, ignore_errors=True)
    for left in ("recipe.toml", "summary.json", "events.jsonl"):
        (finished_run / left).unlink(missing_ok=True)
    return finished_run.parent.parent


@pytest.fixture
def start(user: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        command = [*CLI, "distill", "--name", "tiny", *SMALL, *words]
        process = subprocess.Popen(
            command,
            cwd=user,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def steps_of(run: Path) -> list[int]:
    lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["step"] for event in events if event["kind"] == "metric" and "loss" in event["values"]]


def ranks_of(run: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"pipeline.rank {run.resolve()}"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_T1_asked_to_stop_two_ranks_save_and_the_command_says_how_to_go_on(
    user: Path, start: Callable[..., Any]
) -> None:
    run = user / "runs" / "tiny"
    process = start("--gpus", "2", "--set", ENDLESS)
    wait_for(lambda: len(steps_of(run)) >= 2)
    assert len(ranks_of(run)) == 2
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert said.endswith("stopped; run the same command again to go on\n")
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{max(steps_of(run)):08d}"
    assert json.loads((run / ".lock").read_text())["outcome"] == "interrupted"
    assert ranks_of(run) == []


def test_T1_a_launcher_that_is_killed_leaves_no_rank_behind_and_a_checkpoint(
    user: Path, start: Callable[..., Any]
) -> None:
    run = user / "runs" / "tiny"
    process = start("--gpus", "1", "--set", ENDLESS)
    wait_for(lambda: len(steps_of(run)) >= 2)
    process.kill()
    wait_for(lambda: not ranks_of(run))
    assert process.stdout is not None
    said = process.stdout.read()
    assert len(list((run / "checkpoints").glob("*"))) == 1, said


STOPPED = {"finished": False, "steps": 3, "positions": 96, "seconds": 1.5, "ranks": 1, "precision": "fp32"}


def test_a_stop_that_reaches_the_ranks_alone_is_told_as_a_stop(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(user / "runs" / "tiny")
    monkeypatch.setattr(launch, "run_ranks", lambda run, *_, **__: run.report("distill", STOPPED))
    facts = steps.distill(load("smollm2-demo"), run, shards=None, gpus=1)
    assert distill_lines(facts, run)[-1] == "stopped    run the same command again to go on"
    assert run_facts(run).state == "stopped"


def test_a_run_knows_the_set_that_it_was_trained_from(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, run = str(user / "runs" / "tiny" / "shards"), RunFolder(user / "runs" / "other")
    run.adopt(load("smollm2-demo"))
    with pytest.raises(PipelineError, match="no shards in") as refused:
        steps.shards_of(run, None)
    assert "--shards" in refused.value.hint
    monkeypatch.setenv("RANK", "0")
    result = TrainResult(**STOPPED, untrained=None, validation=None, kl_is="", cached={})  # type: ignore[arg-type]
    monkeypatch.setattr("stages.distill.train.train", lambda **_: result)
    rank._train(run, place, silent)
    assert steps.shards_of(run, None) == Path(place)


def test_the_failure_of_a_rank_is_there_whole_or_not_at_all(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = RunFolder(user / "runs" / "tiny"), iter(["the first", "another"])
    monkeypatch.setattr(sys, "argv", ["rank", str(run.path), "shards", "none"])
    monkeypatch.setenv("RANK", "1")
    for of_a_process_alone in ("settle_in", "_stop_with_the_launcher"):
        monkeypatch.setattr(rank, of_a_process_alone, lambda: None)

    def fail(*_: object) -> None:
        raise StageError(next(said), hint="try again")

    monkeypatch.setattr(rank, "_train", fail)
    with pytest.raises(SystemExit):
        rank.main()
    (written,) = run.path.glob(".rank_failure*")
    with written.open() as reader:
        with pytest.raises(SystemExit):
            rank.main()
        assert json.load(reader)[0] == "the first", "who reads meanwhile reads what was whole"
    failure = rank.failure_of(run, "exit code 1")
    assert (str(failure), failure.hint) == ("another", "try again")
    assert str(rank.failure_of(run, "exit code 1")) == "exit code 1", "it is told once"


PDSH = f"""#!{sys.executable}
# pdsh's part that DeepSpeed uses: one command for every host, %n its number; here all hosts are this machine.
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = words[next(i for i, word in enumerate(words) if "export" in word or word.startswith("cd ")):]
print("pdsh", *command, flush=True)
running = [subprocess.Popen(["bash", "-c", " ".join(command).replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(process.wait() for process in running))
"""
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
host=$1; shift
[[ $host == silent ]] && { echo "ssh: connect to host silent port 22: timed out" >&2; exit 255; }
[[ $host == blind ]] && exit 1
[[ "$*" == "hostname -I" ]] && { echo 127.0.0.1; exit 0; }
exec bash -c "$*"
"""


@pytest.fixture
def other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A PATH on which ssh and pdsh reach worker-1 and worker-2, which are this machine; silent and blind fail."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return os.environ["PATH"]


def test_two_machines_of_a_hostfile_train_one_student(
    user: Path, start: Callable[..., Any], other_machines: str
) -> None:
    (user / "hosts").write_text("# ours\nworker-1 slots=1\nworker-2 slots=1\n")
    process = start("--hosts", "hosts", "--set", "distill.epochs=2", PATH=other_machines)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    summary = json.loads((user / "runs" / "tiny" / "summary.json").read_text())
    assert (summary["distill"]["ranks"], summary["distill"]["finished"]) == (2, True)
    (carried,) = [line for line in said.splitlines() if line.startswith("pdsh ")]
    assert "export PYTHONPATH=" in carried
    for machines_own in ("DS_ACCELERATOR", "OMP_NUM_THREADS"):
        assert machines_own not in carried, "another machine may have what this one lacks"


@pytest.mark.parametrize("told_by", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_ranks_share_the_cores_of_the_machine_they_are_on(told_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {told_by: "3"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    rank.settle_in()
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_machine_that_does_not_answer_or_see_the_run_is_named_before_anything_starts(
    user: Path, start: Callable[..., Any], other_machines: str, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=1\nsilent slots=1\n")
    said, _ = (process := start("--hosts", str(hosts), PATH=other_machines)).communicate(timeout=120)
    assert process.returncode == 1
    assert (
        "error: no answer by ssh from silent (ssh: connect to host silent port 22: timed out)\nhint: ssh to it" in said
    )
    assert steps_of(user / "runs" / "tiny") == []
    hosts.write_text("worker-1 slots=1\nblind slots=1\n")
    run = RunFolder(user / "runs" / "tiny")
    with pytest.raises(
        PipelineError, match=r"^blind does not see all of .*/runs/tiny/recipe.toml, .*/runs/tiny/shards$"
    ):
        check_hosts(read_hosts(hosts, 4), run, run.shards)
    hosts.write_text("worker-1 slots=1\n")
    check_hosts(read_hosts(hosts, 4), run, run.shards)
    check_hosts(read_hosts(hosts, 4), run, "s3://bucket/set")
    with pytest.raises(PipelineError, match=r"^worker-1 does not see all of .*/only/here$"):
        check_hosts(read_hosts(hosts, 4), run, tmp_path / "only" / "here")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("worker-1", "line 1: 'worker-1'"),
        ("worker-1 slots=0", "line 1"),
        ("a slots=1\n\na slots=1", "line 3"),
        ("# nobody\n", "names no machine"),
        ("a slots=2\nb slots=3", "5 slots, which do not divide the global batch of 48"),
        (None, "no hostfile"),
    ],
)
def test_a_hostfile_that_cannot_work_is_refused_by_line(text: str | None, named: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=named):
        read_hosts(file, 48)


def test_without_pdsh_that_is_said(user: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("worker-1 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="pdsh, by which"):
        check_hosts(read_hosts(tmp_path / "hosts", 4), RunFolder(user / "runs" / "tiny"), "s3://bucket/set")


@pytest.mark.skipif(shutil.which("screen") is None, reason="screen is not installed on this machine")
def test_in_a_screen_session_it_outlives_the_terminal_that_started_it(user: Path) -> None:
    name = f"tiny{os.getpid()}"
    shutil.copytree(user / "runs" / "tiny", user / "runs" / name)
    for shared in (".venv", "cli.py", "Makefile", "requirements", "pyproject.toml"):
        (user / shared).symlink_to(ROOT / shared)
    settings = " ".join(word for word in SMALL[2:] if word != "--set")
    make = ["make", "--no-print-directory", "distill-screen", "-o", "setup"]
    words = [*make, f"NAME={name}", "RECIPE=smollm2-demo", "GPUS=1", f"SET={settings} {ENDLESS}"]
    run, environment = user / "runs" / name, {**os.environ, "OMP_NUM_THREADS": "1"}
    # A session of its own, whose end is the terminal's.
    started = subprocess.run(words, cwd=user, env=environment, capture_output=True, text=True, start_new_session=True)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        assert f"screen -r {name}" in started.stdout
        wait_for(lambda: len(steps_of(run)) >= 2)
        again = subprocess.run(words, cwd=user, env=environment, capture_output=True, text=True)
        assert again.returncode != 0
        assert f"there is a screen session {name} already" in again.stdout
    finally:
        subprocess.run(["screen", "-S", name, "-X", "stuff", "\003"], check=False)
        stopped = lambda: f".{name}\t" not in subprocess.run(["screen", "-ls"], capture_output=True, text=True).stdout  # noqa: E731
        wait_for(stopped)
    assert list((run / "checkpoints").iterdir()), "Ctrl-C in the session saved"
    assert "stopped; run the same command again" in (user / "runs" / f"{name}.screen.log").read_text(errors="replace")


def test_tensorboard_holds_every_metric_and_a_resumed_run_takes_back_what_came_after(tmp_path: Path) -> None:
    def log(steps: range, shift: float) -> None:
        (board,) = sinks("tensorboard", tmp_path)
        for step in steps:
            board(Metric(stage="distill", step=step, values={"kl": step + shift}))
        board(Note(stage="distill", text="half way"))
        board.close()

    log(range(1, 6), 0.0)
    log(range(3, 5), 0.5)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("distill/kl")] == [(1, 1), (2, 2), (3, 3.5), (4, 4.5)]


def test_another_tracker_is_spoken_to_in_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[Any] = []
    service = types.SimpleNamespace(
        init=lambda **facts: said.append(facts),
        log=lambda values, step: said.append((values, step)),
        finish=lambda: said.append("finished"),
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, "wandb", service)
    require_tracker("wandb")
    for _ in range(2):
        (sink,) = sinks("wandb", tmp_path / "runs" / "mine")
        sink(Metric(stage="distill", step=3, values={"kl": 0.5}))
        sink.close()
    began = {"project": "minicodformer", "name": "mine", "resume": "allow", "id": said[0]["id"]}
    assert said == [began, ({"distill/kl": 0.5}, 3), "finished"] * 2, "wandb resumes by the id alone"
    sinks("wandb", tmp_path / "elsewhere" / "mine")
    assert said[-1]["id"] != began["id"]
    monkeypatch.setitem(sys.modules, "trackio", service)
    sinks("trackio", tmp_path / "runs" / "mine")
    assert said[-1] == {"project": "minicodformer", "name": "mine", "resume": "allow"}


def test_a_tracker_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UsageError, match="the tracker trackio is not installed") as refused:
        require_tracker("trackio")
    assert ".venv/bin/python -m pip install trackio" in refused.value.hint
    with pytest.raises(UsageError, match="no tracker 'excel'"):
        require_tracker("excel")
    assert sinks("none", tmp_path) == ()
