"""A verb's turn with a run: the lock that only one process holds, and what became of the turn.

The lock file holds one JSON object, written when the turn begins and again when it ends. Whether a turn is still on is
the kernel's word, not the file's: a killed process lets go of the lock and leaves an outcome of "running" behind.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from pipeline.errors import PipelineError

LOCK = ".lock"
Outcome = Literal["running", "ended", "interrupted", "failed"]
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of Linux on 64 bits: type, whence, start, length, process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The newest verb that held a run."""

    verb: str
    process: int
    host: str
    began: float
    """Seconds since 1970, as are all times here."""
    ended: float | None = None
    outcome: Outcome = "running"
    error: str = ""
    """What a failed turn said last."""


@contextmanager
def take_turn(folder: Path, verb: str) -> Iterator[None]:
    """Hold `folder` for one writing process and write down how that ended.

    Raises PipelineError naming the holder if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as handle:
        if not _locked(handle):
            standing = read_turn(folder)
            holder = f"`{standing.verb}`, process {standing.process}" if standing else "another process"
            raise PipelineError(
                f"{folder} is in use by {holder}",
                hint="wait for it, stop it, or give this run another name with NAME=… (--name …)",
            )
        turn = Turn(verb=verb, process=os.getpid(), host=socket.gethostname(), began=round(time.time(), 3))
        _write(handle, turn)
        outcome: Outcome = "failed"
        error = ""
        try:
            yield
            outcome = "ended"
        except Exception as raised:
            error = str(raised) or type(raised).__name__
            raise
        except BaseException:
            outcome = "interrupted"
            raise
        finally:
            ended = round(time.time(), 3)
            _write(handle, dataclasses.replace(turn, ended=ended, outcome=outcome, error=error))


def read_turn(folder: Path) -> Turn | None:
    """The newest turn; None where there was none, or it is being written."""
    try:
        return Turn(**json.loads((folder / LOCK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process holds the run now. To ask is not to take: no verb is ever kept waiting by a look."""
    try:
        with (folder / LOCK).open("rb") as handle:
            answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_RDLCK))
    except OSError:
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _locked(handle: TextIO) -> bool:
    """Take the lock of an open file, which whoever inherits or closes it last lets go of."""
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
    except BlockingIOError:
        return False
    return True


def _whole_file(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _write(handle: TextIO, turn: Turn) -> None:
    handle.truncate(0)
    handle.write(json.dumps(dataclasses.asdict(turn), ensure_ascii=False) + "\n")
    handle.flush()
