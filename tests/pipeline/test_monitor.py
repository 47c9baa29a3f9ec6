"""The monitor as a user meets it: once, as JSON, and live on a terminal that Ctrl-C gives back."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.event_log import EventLog
from pipeline.load import LoadMeter, parse_gpus
from pipeline.measured import model_sha256
from pipeline.monitor import Watcher
from pipeline.run import RunFolder
from pipeline.terminal.dashboard import rendered, sparkline
from stages.events import Answered, Metric, Note, Progress

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was left in the middle, with a metric that nobody knows."""
    run = RunFolder(tmp_path / "runs" / "r")
    log = EventLog(run.events)
    log(Note(stage="distill", text="ranks: 2 on cpu"))
    for step in range(1, 6):
        log(Metric(stage="distill", step=step, values={"kl": 5.0 - step, "aurora": 0.25 * step}))
        log(Progress(stage="distill", done=step, total=10, unit="steps"))
        time.sleep(0.002)
    for step, answer in ((0, "six six"), (5, "It is 41.")):
        log(Answered(stage="distill", step=step, prompt="What is 6 x 7?", answer=answer, label="42"))
    log.close()
    return run


def cli(run: RunFolder, *words: str) -> subprocess.CompletedProcess[str]:
    place = run.path.parent.parent
    return subprocess.run([sys.executable, str(CLI), *words], cwd=place, capture_output=True, text=True, timeout=60)


def test_once_shows_state_progress_curves_load_notes_and_answers(run: RunFolder) -> None:
    done = cli(run, "monitor", "r", "--once")
    assert done.returncode == 0, done.stderr
    for said in ("r  stopped", "50%", "5/10 steps", "kl", "aurora", "1.250", "CPU", "memory", "ranks: 2", "It is 41."):
        assert said in done.stdout
    assert "answers after 5 steps" in done.stdout
    assert "six six" not in done.stdout, "the newest alone"
    assert "\x1b" not in done.stdout


def test_once_it_is_evaluated_the_answers_of_the_finished_student_are_shown(run: RunFolder) -> None:
    (during,) = Watcher(run).look().samples
    assert (during.step, during.answer) == (5, "It is 41.")
    weights = run.final_model / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    samples = [{"prompt": "What is 6 x 7?", "answer": "It is 42.", "label": "42"}]
    run.report("evaluate", {"samples": samples, "made_from": {"model_sha256": model_sha256(run)}})
    view = Watcher(run).look()
    assert [(sample.step, sample.answer) for sample in view.samples] == [(None, "It is 42.")]
    assert "answers of the newest evaluation" in rendered(view)
    weights.unlink()
    assert Watcher(run).look().samples == (during,), "the run is trained anew"


def test_json_has_the_same_and_no_number_that_json_does_not_know(run: RunFolder) -> None:
    log = EventLog(run.events)
    log(Metric(stage="distill", step=6, values={"kl": float("nan")}))
    view = json.loads(cli(run, "monitor", "--json").stdout, parse_constant=lambda name: pytest.fail(name))
    assert view["facts"]["name"] == "r"
    assert [stage["done"] for stage in view["stages"]] == [5]
    curves = {curve["name"]: curve for curve in view["curves"]}
    assert curves["aurora"]["values"] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert curves["kl"]["values"] == [4.0, 3.0, 2.0, 1.0, 0.0, None]
    assert view["warnings"] == ["distill: kl is nan at step 6"]
    assert view["load"]["memory_total"] > 0


def test_the_watcher_follows_and_a_replaced_log_starts_anew(run: RunFolder) -> None:
    watcher = Watcher(run)
    assert watcher.look().stages[0].done == 5
    log = EventLog(run.events)
    log(Progress(stage="distill", done=6, total=10, unit="steps"))
    assert watcher.look().stages[0].done == 6
    run.events.unlink()
    assert watcher.look().stages[0].done == 6
    EventLog(run.events)(Progress(stage="teacher-cache", done=1, total=2, unit="response tokens"))
    assert [stage.stage for stage in watcher.look().stages] == ["teacher-cache"]


def test_a_running_run_has_a_time_left_and_its_processes_load(run: RunFolder) -> None:
    busy = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    with run.lock("distill"):
        child = subprocess.Popen([sys.executable, "-c", busy])
        try:
            log = EventLog(run.events)
            watcher = Watcher(run)
            for done in (6, 7):
                log(Progress(stage="distill", done=done, total=10, unit="steps"))
                time.sleep(0.1)
                watcher.look()
            time.sleep(0.5)
            view = watcher.look()
        finally:
            child.kill()
            child.wait()
    (stage,) = view.stages
    assert stage.rate is not None
    assert stage.left == pytest.approx(3 / stage.rate)
    assert view.load.processes >= 2
    assert view.load.run_cores > 0
    assert view.load.run_memory > 10**7
    assert "ETA" in rendered(view)
    assert Watcher(run).look().stages[0].left is None


def test_live_it_draws_on_the_terminal_until_ctrl_c(run: RunFolder) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(CLI), "monitor"],
        cwd=run.path.parent.parent,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(slave)
    seen = b""
    log = EventLog(run.events)
    asked = False
    try:
        while True:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
            if b"5/10" in seen and not asked:
                log(Progress(stage="distill", done=7, total=10, unit="steps"))
            if b"7/10" in seen and not asked:
                process.send_signal(signal.SIGINT)
                asked = True
    finally:
        process.kill() if not asked else None
        os.close(master)
    assert process.wait(timeout=20) == 0
    assert b"Traceback" not in seen
    after = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen.rpartition(b"\x1b[?1049l")[2])
    assert b"7/10 steps" in after, "the last view stays on the screen"


def test_gpus_as_the_driver_lists_them() -> None:
    answer = "0, 97, 70123, 81559, 61, 512.33\n1, [N/A], 3, 81559, 33, [N/A]\nNo devices were found\n"
    first, second = parse_gpus(answer)
    assert (first.busy, first.memory_used, first.watts) == (0.97, 70123 << 20, 512.33)
    assert (second.index, second.busy, second.celsius, second.watts) == (1, None, 33.0, None)


def test_a_process_that_is_gone_costs_nothing_but_its_figures(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    load = LoadMeter().read(tmp_path, gone.pid)
    assert (load.processes, load.run_memory) == (0, 0)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([3.0], "▁"),
        ([1, 1, 1], "▁▁▁"),
        ([0, float("nan"), 7], "▁ █"),
        ([float("inf")], " "),
        ([0, 0, 7, 7, 0, 0, 7, 7, 0, 0, 7, 7, 0, 0, 7, 7], "▁█▁█▁█▁█"),
    ],
)
def test_a_sparkline_shows_height_and_gaps(values: list[float], drawn: str) -> None:
    assert sparkline(values, 8) == drawn
