"""The process that writes responses: what it says when it fails, and that its command fails as it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import responses
from pipeline.errors import PipelineError, UsageError
from pipeline.recipe import load
from pipeline.run import RunFolder
from pipeline.steps import _with_responses


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "r")
    run.adopt(load("smollm2-demo", ["respond.by=teacher", "teacher.model=/nowhere"]))
    return run


@pytest.fixture
def write(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The process's main, within this one: its exit code."""
    monkeypatch.setattr(sys, "argv", ["responses", str(run.path), "data/processed"])

    def write() -> int:
        with pytest.raises(SystemExit) as stop:
            responses.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code

    return write


def test_a_teacher_that_is_none_is_told_in_two_lines(
    write: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert write() == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no teacher '/nowhere'")
    assert hint.startswith("hint: name a folder")


def test_a_disk_that_refuses_is_told_in_two_lines(
    write: Callable[[], int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "responses")

    monkeypatch.setattr(responses, "teacher_folder", refuse)
    assert write() == 1
    assert "error: [Errno 13] Permission denied: 'responses'\nhint: check who owns" in capsys.readouterr().err


def test_the_command_that_waits_for_it_fails_as_it_does(run: RunFolder) -> None:
    with pytest.raises(UsageError, match="could not be written"):
        _with_responses(run)
    run.recipe_file.unlink()
    with pytest.raises(PipelineError, match="could not be written") as caught:
        _with_responses(run)
    assert not isinstance(caught.value, UsageError)
