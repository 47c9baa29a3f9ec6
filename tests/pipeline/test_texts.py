"""The corpus by path or by name: generated once, the same everywhere, checked against its pin."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline import assets
from pipeline.assets import corpus_file
from pipeline.errors import PipelineError, UsageError
from pipeline.word_problems import write_word_problems
from stages.events import Emit, Event, Progress, silent


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICODFORMER_CACHE", str(tmp_path / "cache"))


def test_the_demos_text_is_the_pinned_one_whole_and_not_doubled() -> None:
    events: list[Event] = []
    path = corpus_file("demo:gsm-symbolic", events.append)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["input"] for row in rows}) == 800
    assert all(row.keys() == {"input", "reasoning_content", "content", "repo_name", "score"} for row in rows)
    assert all(row["reasoning_content"] and "####" not in row["reasoning_content"] for row in rows)
    assert all(row["score"] == 1.0 for row in rows)
    assert [event.done for event in events if isinstance(event, Progress)][-1] == 800

    again: list[Event] = []
    assert corpus_file("demo:gsm-symbolic", again.append) == path
    assert again == []


def test_the_demos_text_is_the_same_in_every_process(tmp_path: Path) -> None:
    write_word_problems(tmp_path / "here.jsonl", silent)
    code = (
        "import sys, pathlib; from pipeline.word_problems import write_word_problems as write;"
        "write(pathlib.Path(sys.argv[1]), lambda event: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there.jsonl")],
        env=os.environ | {"PYTHONHASHSEED": "4242"},
        cwd=Path(assets.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()
    assert done.stderr == "", "the package's warnings are not the reader's business"


def test_another_text_than_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, emit: Emit) -> None:
        path.write_text("{}\n")

    pinned = dataclasses.replace(assets.TEXTS["gsm-symbolic"], write=write)
    monkeypatch.setattr(assets, "TEXTS", {"gsm-symbolic": pinned})
    with pytest.raises(PipelineError, match=pinned.sha256) as caught:
        corpus_file("demo:gsm-symbolic", silent)
    assert sha256(b"{}\n").hexdigest() in str(caught.value)


def test_a_path_is_checked_and_returned(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UsageError, match="does not exist"):
        corpus_file(str(path), silent)
    path.touch()
    assert corpus_file(str(path), silent) == path
    with pytest.raises(UsageError, match="is not a file"):
        corpus_file(str(tmp_path), silent)
