"""Processes and devices: what this machine has, and how a stage is spread over it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import UsageError
from pipeline.rank import failure_of, forget_failure
from pipeline.run import RunFolder
from stages.distill.settings import possible_ranks

STOP_WITHIN_S = 600
"""How long ranks may take to end their step and save, once asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a stage can be spread over."""

    gpus: int
    cores: int

    def describe(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else f"no GPU, {self.cores} CPU cores"


def machine() -> Machine:
    """The GPUs torch can see and the cores this process may use."""
    import torch

    return Machine(gpus=torch.cuda.device_count(), cores=len(os.sched_getaffinity(0)))


def device_memory(here: Machine, processes: int) -> int:
    """Bytes of the smallest GPU; without GPUs, of what is free here the share of one of so many processes."""
    import torch

    if here.gpus:
        return min(int(torch.cuda.get_device_properties(index).total_memory) for index in range(here.gpus))
    return int(psutil.virtual_memory().available) // processes


def default_ranks(here: Machine, global_batch: int) -> int:
    """As many as can share the global batch: of all GPUs; without one, of two processes (more only split the cores)."""
    return possible_ranks(here.gpus or min(2, here.cores), global_batch)[-1]


def check_ranks(count: int, here: Machine, global_batch: int) -> None:
    """Refuse a rank count that cannot work, naming those that can.

    Raises UsageError: every rank needs its own GPU where there are GPUs, and the same share of the global batch.
    """
    possible = possible_ranks(here.gpus or global_batch, global_batch)
    if count in possible:
        return
    counts = ", ".join(map(str, possible))
    if here.gpus and count > here.gpus:
        raise UsageError(f"GPUS={count}, but this machine has {here.describe()}", hint=f"GPUS can be {counts}")
    raise UsageError(
        f"GPUS={count} does not divide the global batch of {global_batch} records", hint=f"GPUS can be {counts}"
    )


def count_replicas(gpus: int | None, tensor_parallel: int, here: Machine, sizes: Sequence[int]) -> int:
    """How many copies of the teacher run on `gpus` devices, `tensor_parallel` to each; None means all there are.

    Without a GPU a device is a process, and one copy is enough. `sizes` are the splits that the teacher allows. Raises
    UsageError naming the counts that can work.
    """
    most = here.gpus or max(gpus or 1, tensor_parallel)
    possible = [size for size in sizes if size <= most]
    if tensor_parallel not in possible:
        raise UsageError(
            f"TP={tensor_parallel}: the teacher cannot be split over so many of {most} devices",
            hint=f"TP can be {', '.join(map(str, possible))}",
        )
    if gpus is None:
        return max(1, here.gpus // tensor_parallel)
    if not 1 <= gpus <= most or gpus % tensor_parallel:
        counts = ", ".join(map(str, range(tensor_parallel, most + 1, tensor_parallel)))
        raise UsageError(
            f"GPUS={gpus} with TP={tensor_parallel} cannot work on {here.describe()}",
            hint=f"with TP={tensor_parallel}, GPUS can be {counts}",
        )
    return gpus // tensor_parallel


def run_ranks(run: RunFolder, shards: Path | str, count: int, *, tracker: str) -> None:
    """Train with `count` processes on this machine, through torch's elastic launcher.

    SIGTERM and Ctrl-C ask the ranks to save after the step they are in; SystemExit of that signal follows. A second one
    does not wait. Raises PipelineError with the message and hint of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say what failed, once
    forget_failure(run)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=run.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        shutdown_timeout=STOP_WITHIN_S,
    )
    try:
        elastic_launch(config, sys.executable)(*rank_command(run, shards, tracker))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        raise failure_of(run, f"rank {rank} ended with exit code {first.exitcode}") from error
    except SignalException as asked:
        sys.exit(128 + asked.sigval)
    finally:
        for left in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                left.kill()


def rank_command(run: RunFolder, shards: Path | str, tracker: str) -> tuple[str, ...]:
    """What every rank runs, after the interpreter's name."""
    return "-m", "pipeline.rank", str(run.path.resolve()), str(shards), tracker
