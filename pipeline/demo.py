"""The demo: the verbs of the command line, one after the other, each as the command you could type yourself.

Every verb runs in a process of its own, so that the teacher's memory is gone before the student trains.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.launch import check_ranks, default_ranks, machine
from pipeline.recipe import load
from pipeline.run import RUNS, RunFolder
from pipeline.summary import demo_lines

RECIPE = "smollm2-demo"
_CLI = Path(__file__).resolve().parent.parent / "cli.py"


def run_demo(name: str, gpus: int | None) -> list[str]:
    """Run every verb of the main job; return the lines of the closing summary.

    Raises UsageError for a count of ranks that cannot work, before anything is fetched, and PipelineError naming the
    verb that failed; its own error lines stand above.
    """
    start = time.monotonic()
    chosen = ["--recipe", RECIPE, "--name", name]
    here = machine()
    batch = load(RECIPE).distill.global_batch
    ranks = default_ranks(here, batch) if gpus is None else gpus
    check_ranks(ranks, here, batch)
    for words in (
        ["prepare", *chosen],
        ["teacher-cache", *chosen],
        ["distill", *chosen, "--gpus", str(ranks)],
        ["evaluate", "--name", name],
    ):
        print(f"\n$ cli.py {' '.join(words)}", flush=True)  # noqa: T201
        code = subprocess.run([sys.executable, str(_CLI), *words], check=False).returncode
        if code:
            raise PipelineError(
                f"the demo stopped at `{words[0]}` (exit code {code})",
                hint="its own error is above; `make demo` again goes on from there",
            )
    return demo_lines(RunFolder(RUNS / name), time.monotonic() - start)
