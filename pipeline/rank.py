"""What each launched process runs: `python -m pipeline.rank RUN SHARDS TRACKER`. Rank 0 speaks for all."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.run import RunFolder, write_atomically
from pipeline.sinks import listening
from pipeline.trackers import sinks
from shards.errors import ShardError
from stages.errors import StageError
from stages.events import Emit, silent

_FAILURE = ".rank_failure.json"


@dataclass(frozen=True, slots=True)
class Failure:
    message: str
    hint: str


def take_failure(run: RunFolder) -> Failure | None:
    """The error that a rank of the last launch could name, if one could; it is forgotten by reading it."""
    path = run.path / _FAILURE
    if not path.is_file():
        return None
    failure = Failure(**json.loads(path.read_text(encoding="utf-8")))
    path.unlink()
    return failure


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


def _stop_with_the_launcher() -> None:
    """A launcher that is killed leaves no ranks behind: the kernel asks them to stop, and they save."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def main() -> None:
    run, shards, tracker = RunFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    _stop_with_the_launcher()
    try:
        with listening(run.events, others=sinks(tracker, run.path)) if _is_speaker() else nullcontext(silent) as emit:
            _train(run, shards, emit)
    except (StageError, ShardError) as error:
        # Every rank sees the same inputs; the first to fail names the cause, whoever it is.
        write_atomically(run.path / _FAILURE, json.dumps(asdict(Failure(str(error), error.hint))))
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
