"""One writer at a time, and a set of files that is either the old, the new or none: never a mixture taken for whole.

What is made stands in a staging folder inside the target until all of it is on the disk. Publishing then takes the
old commit file away, moves the files, and moves the new commit file in last.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shards.durable import sync

_STAGING = ".staging"
_LOCK = ".lock"


@contextmanager
def exclusive(folder: Path, *, waiting: Callable[[], None]) -> Iterator[Path]:
    """Hold `folder` alone and yield an empty staging folder in it; calls `waiting` once if somebody else holds it.

    The lock is the kernel's: a killed process lets go of it, and what it left in staging is removed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        staging = folder / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish_set(staging: Path, folder: Path, names: Sequence[str], *, commit: str) -> None:
    """Move `names` and then `commit`, all relative to `staging`, into `folder`, durably."""
    for name in (*names, commit):
        sync(staging / name)
    (folder / commit).unlink(missing_ok=True)
    sync(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(folder / name)
        sync((folder / name).parent)
    sync(folder)
    (staging / commit).replace(folder / commit)
    sync(folder)
