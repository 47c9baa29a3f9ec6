"""What the fork server runs in a child process: one rank of a training run, with a fault on request.

In a module of its own, because a child finds its function by importing it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from stages.distill.engine import Engine
from stages.distill.train import train
from stages.errors import StageError
from stages.events import Event

# The first optimiser of a process imports half of torch: once, in the fork server, is enough.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_rank(rank: int, world: int, port: int, arguments: Mapping[str, Any], to_parent: Connection, fsync: int) -> None:
    """Train as one rank; send every event, then the result or the error. SIGKILL oneself at flush number `fsync`."""
    torch.set_num_threads(1)
    if world > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ.update(zip(names, map(str, (rank, rank, world, "127.0.0.1", port)), strict=True))
    if fsync:
        _die_at_flush(fsync)

    def emit(event: Event) -> None:
        to_parent.send(event)

    _tell_rates(to_parent)
    try:
        to_parent.send(train(**arguments, emit=emit))
    except StageError as error:
        to_parent.send(error)
    to_parent.close()


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rate and decay of every parameter group, as a step found them."""

    groups: tuple[tuple[float, float], ...]


def _tell_rates(to_parent: Connection) -> None:
    true_step = Engine.step

    def step(engine: Engine) -> float:
        to_parent.send(Rates(tuple((group["lr"], group["weight_decay"]) for group in engine.groups)))
        return true_step(engine)

    Engine.step = step  # type: ignore[method-assign]


def _die_at_flush(number: int) -> None:
    true_fsync, seen = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        true_fsync(descriptor)

    os.fsync = fsync


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if (path / "manifest.json").exists())
