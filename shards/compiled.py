"""Compilation of loops over entries.

- Nothing is compiled, nor the compiler imported, before a loop first runs.
- What was compiled is kept beside its source, or in the user's cache where that cannot be written; where neither can,
  where the disk is full, or where what is kept is torn, each process compiles anew.
- Loops let other threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import update_wrapper
from pathlib import Path
from threading import Lock
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """A function of numpy arrays and numbers that calls no other compiled one. Its indices are not checked."""
    ready: list[Callable[P, T]] = []
    first = Lock()
    source = Path(function.__code__.co_filename)
    loaded = _stamp(source)

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not ready:
            with first:  # of several threads one compiles, the others wait for it
                if not ready:
                    ready.append(_compile(function, keep=_stamp(source) == loaded))
        return ready[0](*args, **kwargs)

    return update_wrapper(run, function)


def _stamp(source: Path) -> tuple[int, int]:
    """By this numba knows whether what it kept is of the source as it is now."""
    try:
        found = source.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _compile(function: Callable[P, T], *, keep: bool) -> Callable[P, T]:
    """Where the source changed after it was loaded, an upgrade, nothing is kept: it would pass for the new one."""
    from numba import njit
    from numba.core.caching import FunctionCache

    class Cache(FunctionCache):
        """A file that cannot be read or written is one that is not there."""

        def load_overload(self, *wanted: Any) -> Any:
            with suppress(Exception):
                return super().load_overload(*wanted)

        def save_overload(self, *made: Any) -> None:
            with suppress(Exception):
                super().save_overload(*made)

    loop: Any = njit(function, nogil=True)
    if keep:
        with suppress(RuntimeError):  # no folder can be written
            loop._cache = Cache(function)
    compiled: Callable[P, T] = loop
    return compiled
