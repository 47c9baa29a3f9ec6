"""An error as its user reads it: what went wrong, what to do about it, and the exit code that says whose it is."""

from __future__ import annotations

import errno

from pipeline.errors import PipelineError, UsageError
from shards.errors import InvalidRequest, ShardError
from stages.errors import StageError

EXPLAINED = (PipelineError, StageError, ShardError, OSError)
"""What is told in lines; anything else is a fault of ours and keeps its traceback."""

_KEPT = "and run the same command again; what was finished is kept"
_HINTS: dict[int | None, str] = {
    errno.ENOSPC: f"make room on the disk {_KEPT}",
    errno.EDQUOT: f"free some of your quota {_KEPT}",
    errno.EACCES: "check who owns the file or folder",
    errno.ENOENT: "check the path: there is nothing at it",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.EISDIR: "check the path: it is a folder, not a file",
    errno.EEXIST: "name another path, or move away what is there",
}


def explained(error: Exception) -> list[str]:
    """One line of what went wrong, and one of what to do where that is known."""
    hint = getattr(error, "hint", "") or _HINTS.get(getattr(error, "errno", None), "")
    return [f"error: {error}", *([f"hint: {hint}"] if hint else [])]


def exit_code(error: Exception) -> int:
    """2 for what nobody can do, 1 for everything else."""
    return 2 if isinstance(error, UsageError | InvalidRequest) else 1
