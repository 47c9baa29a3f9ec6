"""The memory of this process and its device: what is free, and what is in use."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(cgroup: Path = _CGROUP) -> int:
    """What the machine can still give, or the container that this process is in, whichever is less."""
    available: int = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        free = available if limit == "max" else int(limit) - int(used) + _idle_file_bytes(cgroup)
    except (OSError, ValueError):
        return available
    return max(0, min(available, free))


def _idle_file_bytes(cgroup: Path) -> int:
    """Counted as used, but only what was read from files: the kernel drops it where memory is asked for."""
    counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", 0))


def free_device_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most that this process has taken so far: tensors on a GPU; without one, memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
