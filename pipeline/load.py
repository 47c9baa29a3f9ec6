"""How busy this machine and one run's processes are now: CPU, memory, GPUs, disk."""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_QUERY = ("index", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu", "power.draw")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLoad:
    """As the driver says; what it does not say is None."""

    index: int
    busy: float | None
    """Share of the time that a kernel ran, 0 to 1."""
    memory_used: int | None
    memory_total: int | None
    """Bytes."""
    celsius: float | None
    watts: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Bytes and shares of the whole machine; what is the run's own says so."""

    cpu: float
    """Share of all cores since the last look, 0 to 1."""
    cores: int
    memory_used: int
    memory_total: int
    disk_free: int
    """Where the run's folder is."""
    processes: int
    """Of the run, on this machine; 0 where none can be seen."""
    run_cores: float
    """Cores that they kept busy since the last look."""
    run_memory: int
    """Their resident memory; what they share counts in each."""
    gpus: tuple[GpuLoad, ...]


class LoadMeter:
    """Shares are measured between two looks; the first look knows none."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        psutil.cpu_percent()

    def read(self, folder: Path, process: int | None) -> Load:
        """The machine's load, the disk of `folder`, and the process of this machine that works on it, if any."""
        memory = psutil.virtual_memory()
        family = self._family(process)
        cores, resident = 0.0, 0
        for member in family:
            with contextlib.suppress(psutil.Error):
                cores += member.cpu_percent() / 100
                resident += member.memory_info().rss
        return Load(
            cpu=psutil.cpu_percent() / 100,
            cores=psutil.cpu_count() or 1,
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_free=shutil.disk_usage(folder).free,
            processes=len(family),
            run_cores=cores,
            run_memory=resident,
            gpus=gpu_loads(),
        )

    def _family(self, process: int | None) -> list[psutil.Process]:
        """A process and all it started; one seen before is the same object, which knows its last reading."""
        found: list[psutil.Process] = []
        if process is not None:
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(process)
                found = [parent, *parent.children(recursive=True)]
        known = [self._known.get(member.pid, member) for member in found]
        self._known = {member.pid: old if old == member else member for old, member in zip(known, found, strict=True)}
        return list(self._known.values())


def gpu_loads() -> tuple[GpuLoad, ...]:
    """What nvidia-smi says of each GPU; nothing where there is no driver, or it does not answer in time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(answer)


def parse_gpus(answer: str) -> tuple[GpuLoad, ...]:
    """The lines of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; a line that is none is left out."""
    loads = []
    for cells in csv.reader(answer.splitlines(), skipinitialspace=True):
        if len(cells) != len(_QUERY) or not cells[0].isdigit():
            continue
        busy, used, total, celsius, watts = map(_number, cells[1:])
        loads.append(
            GpuLoad(
                index=int(cells[0]),
                busy=None if busy is None else busy / 100,
                memory_used=None if used is None else int(used) * _MIB,
                memory_total=None if total is None else int(total) * _MIB,
                celsius=celsius,
                watts=watts,
            )
        )
    return tuple(loads)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # "[N/A]"
        return None
