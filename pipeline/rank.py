"""What each launched process runs: `python -m pipeline.rank RUN SHARDS TRACKER`. Rank 0 speaks for all."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.run import RunFolder, write_atomically
from pipeline.sinks import listening
from pipeline.trackers import sinks
from shards.errors import ShardError
from stages.errors import StageError
from stages.events import Emit, silent

_FAILURE = ".rank_failure.json"
_FEW_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""oneDNN and torch's binding of it each keep a thousand products in bfloat16 with their memory, and each length of a
batch has its own: a rank of the demo grew from 1.1 to 3.6 GiB within 150 steps. Keeping few costs 5 % of the speed."""


def forget_failure(run: RunFolder) -> None:
    """What a rank of a launch before this one could not do."""
    (run.path / _FAILURE).unlink(missing_ok=True)


def failure_of(run: RunFolder, seen: str) -> PipelineError:
    """The error that a rank of the last launch could name; where none could, what its launcher has `seen`."""
    try:
        message, hint = json.loads((run.path / _FAILURE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        message, hint = seen, f"its last lines are above and in {run.events}; run the same command again to resume"
    forget_failure(run)
    return PipelineError(message, hint=hint)


def _train(run: RunFolder, shards: str, emit: Emit) -> None:
    from stages.distill.train import train

    recipe = run.recipe()
    result = train(
        shards=shards,
        run=run.path,
        settings=recipe.distill,
        objective=recipe.objective,
        shape=recipe.student,
        emit=emit,
    )
    if _is_speaker():
        run.report("distill", {**asdict(result), "shards": shards})


def _is_speaker() -> bool:
    return os.environ["RANK"] == "0"


def settle_in() -> None:
    """Take a share of this machine, which need not be like the launcher's; torch reads of it when it is loaded."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"])  # torch's launcher, DeepSpeed's
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ.update({"OMP_NUM_THREADS": str(threads), **_FEW_PRODUCTS})


def _stop_with_the_launcher() -> None:
    """A launcher that is killed leaves no ranks behind: the kernel asks them to stop, and they save."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def main() -> None:
    run, shards, tracker = RunFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    settle_in()
    _stop_with_the_launcher()
    try:
        with listening(run.events, others=sinks(tracker, run.path)) if _is_speaker() else nullcontext(silent) as emit:
            _train(run, shards, emit)
    except (StageError, ShardError) as error:
        # Every rank sees the same inputs; the first to fail names the cause, whoever it is.
        write_atomically(run.path / _FAILURE, json.dumps([str(error), error.hint]))
        if os.environ.get("MINICODFORMER_DEBUG"):
            traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
    # All is saved and told. Taking the libraries' threads down is left to the system: it has aborted a rank that had
    # finished ("terminate called without an active exception"), and so failed its run; once, and not again in 46 runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
