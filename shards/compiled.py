"""Compilation of loops over entries.

- Nothing is compiled, nor the compiler imported, before a loop first runs.
- What was compiled is kept beside its source, or in the user's cache where that cannot be written; where neither can,
  where the disk is full, or where what is kept is torn, each process compiles anew.
- A loop may call others by their names in its module, wherever they are from: it is of all their sources.
- Loops let other threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial, update_wrapper
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Stamp = tuple[int, int]


class Compiled(Generic[P, T]):
    """A function of numpy arrays and numbers. Its indices are not checked.

    With `exact` it rounds as it is written, on every machine alike; without, sums are taken in whatever order is
    fastest, and products go into them unrounded.
    """

    def __init__(self, function: Callable[P, T], *, exact: bool = True) -> None:
        assert isinstance(function, FunctionType)
        self._function = function
        self._exact = exact
        self._source = Path(function.__code__.co_filename)
        self._loaded = _stamp(self._source)
        self._ready: Callable[P, T] | None = None
        self._first = Lock()
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return (self._ready or self._compiled())(*args, **kwargs)

    def _compiled(self) -> Callable[P, T]:
        with self._first:  # of several threads one compiles, the others wait for it
            if self._ready is None:
                called = {name: loop._compiled() for name, loop in self._called()}
                self._ready = _compile(self._function, called, self._of(), self._exact)
            return self._ready

    def _called(self) -> list[tuple[str, Compiled[..., Any]]]:
        found = [(name, self._function.__globals__.get(name)) for name in self._function.__code__.co_names]
        return [(name, loop) for name, loop in found if isinstance(loop, Compiled)]

    def _of(self) -> list[Stamp] | None:
        """Stamps of all sources; None where one changed after it was loaded: what is old would pass for the new one."""
        stamps = [self._loaded] if _stamp(self._source) == self._loaded else None
        for _, loop in self._called():
            others = loop._of()
            stamps = None if stamps is None or others is None else stamps + others
        return stamps


compiled = Compiled
compiled_freely = partial(Compiled, exact=False)


def _stamp(source: Path) -> Stamp:
    """By this numba knows whether what it kept is of the source as it is now."""
    try:
        found = source.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _compile(function: FunctionType, called: dict[str, Any], stamps: list[Stamp] | None, exact: bool) -> Any:
    """With the loops that it calls in the place of their names; nothing is kept where there are no stamps."""
    from numba import njit
    from numba.core.caching import FunctionCache

    class Cache(FunctionCache):
        """A file that cannot be read or written is one that is not there."""

        def __init__(self) -> None:
            super().__init__(function)
            self._cache_file._source_stamp = stamps

        def load_overload(self, *wanted: Any) -> Any:
            with suppress(Exception):
                return super().load_overload(*wanted)

        def save_overload(self, *made: Any) -> None:
            with suppress(Exception):
                super().save_overload(*made)

    space = function.__globals__ | called
    loop = njit(
        FunctionType(function.__code__, space, function.__name__, function.__defaults__),
        nogil=True,
        forceinline=True,
        fastmath=False if exact else {"contract", "nsz", "reassoc"},
    )
    if stamps is not None:
        with suppress(RuntimeError):  # no folder can be written
            loop._cache = Cache()
    return loop
