"""Both stages over the number of processes: response tokens a second, beside as many times what one process does.

The demo's teacher reads, and the default student learns from, the same few word problems, each through the command line
as a user would start it. A process has a GPU where there are GPUs, else one core, which the others may not use.
Counted is what passes once every process is at work: neither loading nor the first step.

    python -m benchmarks.processes
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.record import Row, compare, write
from benchmarks.teacher_logits import FOLDER
from pipeline.event_log import EventReader, Logged
from pipeline.launch import machine
from pipeline.run import RunFolder
from stages.distill.start import STAGE as DISTILL
from stages.events import Metric, Progress
from stages.teacher_cache.replica import STAGE as TEACHER_CACHE

CLI = Path(__file__).parents[1] / "cli.py"
HOME = FOLDER / "processes"
SAMPLES, SAMPLES_A_SHARD, GLOBAL_BATCH = 160, 8, 8
SETTINGS = (
    f"corpus.train_size={SAMPLES}",
    "corpus.val_size=8",
    f"cache.records_per_shard={SAMPLES_A_SHARD}",
    f"distill.global_batch={GLOBAL_BATCH}",
    "distill.checkpoint_every=1000",
    "distill.validate_every=1000",
)


def command(verb: str, *words: str, devices: int) -> None:
    """Run a verb on as many GPUs, or cores where there is none. Raises CalledProcessError."""
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    here, mine = machine(), os.sched_getaffinity(0)
    if not here.gpus:
        os.sched_setaffinity(0, sorted(mine)[:devices])
    try:
        recipe = ("--recipe", "smollm2-demo")
        subprocess.run([sys.executable, str(CLI), verb, *recipe, *words, *overrides], cwd=HOME, check=True)
    finally:
        os.sched_setaffinity(0, mine)


def cached_tokens_a_second(log: Sequence[Logged], replicas: int) -> float:
    """Of stage one, from when each of several replicas has finished a part."""
    everyone = (
        logged.time for logged in log if isinstance(logged.event, Metric) and len(logged.event.values) == replicas
    )
    since = next(everyone) if replicas > 1 else 0.0
    progress = [
        (logged.time, logged.event.done)
        for logged in log
        if isinstance(logged.event, Progress) and logged.event.stage == TEACHER_CACHE and logged.time >= since
    ]
    moving = [point for point in progress if point[1]]
    (start, before), (end, after) = moving[0], moving[-1]
    return (after - before) / (end - start)


def trained_tokens_a_second(log: Sequence[Logged]) -> float:
    """Of stage two, the median step but the first two."""
    rates = [
        logged.event.values["tokens_per_s"]
        for logged in log
        if isinstance(logged.event, Metric) and logged.event.stage == DISTILL and "tokens_per_s" in logged.event.values
    ]
    return statistics.median(rates[2:])


def measure(processes: int) -> tuple[float, float]:
    """Response tokens a second of stage one and of stage two."""
    name, count = f"of-{processes}", ("--gpus", str(processes))
    run = RunFolder(HOME / "runs" / name)
    shutil.rmtree(run.path, ignore_errors=True)
    command("teacher-cache", "--name", name, *count, devices=processes)
    cached = cached_tokens_a_second(EventReader(run.events).read(), processes)
    command("distill", "--name", name, *count, devices=processes)
    return cached, trained_tokens_a_second(EventReader(run.events).read())


def rows(counts: Sequence[int]) -> Iterator[Row]:
    HOME.mkdir(parents=True, exist_ok=True)
    command("prepare", devices=1)
    one: tuple[float, float] | None = None
    for processes in counts:
        rates = measure(processes)
        one = one or rates
        for stage, rate, alone in zip(("stage one", "stage two"), rates, one, strict=True):
            yield compare(
                f"{processes} process" + "es" * (processes > 1),
                f"{stage}, response tokens",
                "tokens/s",
                rate,
                processes * alone,
                "times one process",
                more_is_better=True,
            )


def main() -> None:
    here = machine()
    most = here.gpus or here.cores
    counts = [count for count in range(1, most + 1) if GLOBAL_BATCH % count == 0]
    write(
        "processes",
        list(rows(counts)),
        clock="wall time of the stages' own events",
        packages=("torch", "vllm", "deepspeed", "ray"),
        threads=1,
    )


if __name__ == "__main__":
    main()
