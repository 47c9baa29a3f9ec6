"""Sinks: every event is in the log, the plain stream has rate and time left, resumed work does not flatter the rate."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline import sinks
from pipeline.terminal.bars import LiveBars
from stages.events import Metric, Note, Progress


def test_every_event_reaches_the_log_with_its_fields(tmp_path: Path) -> None:
    with sinks.listening(tmp_path / "events.jsonl", io.StringIO()) as emit:
        emit(Note(stage="s", text="hallo, 世界"))
        emit(Metric(stage="s", step=3, values={"kl": 0.5}))
        emit(Progress(stage="s", done=1, total=2, unit="rows", bytes=7))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.pop("kind") for line in lines] == ["note", "metric", "progress"]
    assert all(line.pop("time") > 1.7e9 for line in lines)
    assert lines == [
        {"stage": "s", "text": "hallo, 世界", "level": "info"},
        {"stage": "s", "step": 3, "values": {"kl": 0.5}},
        {"stage": "s", "done": 1, "total": 2, "unit": "rows", "bytes": 7},
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_tells_share_count_rate_time_left_bytes_and_metrics(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = sinks.PlainLines(stream)
    lines(Metric(stage="cache", step=1, values={"kl": 0.25, "unshown": 9.0}))
    lines(Progress(stage="cache", done=500, total=2000, unit="tokens"))
    clock[0] += 10
    lines(Progress(stage="cache", done=1000, total=2000, unit="tokens", bytes=92_000))
    last = stream.getvalue().splitlines()[-1]
    assert last == "cache:  50%  1,000/2,000 tokens  50 tokens/s  ETA 0:20  92.0 kB  kl 0.250"


def test_bytes_are_told_as_sizes_on_a_terminal_and_off_it(clock: list[float]) -> None:
    stream = io.StringIO()
    for listener in (sinks.PlainLines(stream), LiveBars(stream)):
        for done in (0, 50_000_000):
            clock[0] += 10
            listener(Progress(stage="fetch", done=done, total=92_871_040, unit="bytes"))
        listener.close()
    plain = stream.getvalue().splitlines()[1]
    assert plain == "fetch:  54%  50.0 MB of 92.9 MB  5.0 MB/s  ETA 0:09"
    assert stream.getvalue().count("50.0 MB of 92.9 MB") == 2


def test_plain_lines_are_few_but_the_last_is_always_there(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = sinks.PlainLines(stream)
    for done in range(101):
        clock[0] += 0.1
        lines(Progress(stage="s", done=done, total=100, unit="rows"))
    said = stream.getvalue().splitlines()
    assert len(said) <= 4
    assert said[-1].startswith("s: 100%  100/100 rows")


def test_a_terminal_gets_bars_and_notes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with sinks.listening(None, stream) as emit:
        emit(Note(stage="s", text="KL rises", level="warning"))
        emit(Progress(stage="s", done=5, total=10, unit="rows"))
        emit(Progress(stage="s", done=10, total=10, unit="rows", bytes=3_000_000))
    assert "KL rises" in stream.getvalue()
    assert "10/10 rows" in stream.getvalue()
    assert "3.0 MB" in stream.getvalue()
