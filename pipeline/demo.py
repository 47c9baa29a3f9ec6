"""The demo: the verbs of the command line, one after the other, each as the command you could type yourself.

Every verb runs in a process of its own, so that the teacher's memory is gone before the student trains.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.launch import default_ranks, machine
from pipeline.run import RunFolder
from pipeline.summary import demo_lines

RECIPE = "smollm2-demo"
_CLI = Path(__file__).resolve().parent.parent / "cli.py"


def run_demo(name: str, gpus: int | None) -> list[str]:
    """Run every verb of the main job; return the lines of the closing summary.

    Raises PipelineError naming the verb that failed; its own error lines stand above.
    """
    start = time.monotonic()
    chosen = ["--recipe", RECIPE, "--name", name]
    ranks = str(gpus or default_ranks(machine()))
    for words in (
        ["prepare", *chosen],
        ["teacher-cache", *chosen],
        ["distill", *chosen, "--gpus", ranks],
        ["evaluate", "--name", name],
    ):
        print(f"\n$ cli.py {' '.join(words)}", flush=True)  # noqa: T201
        code = subprocess.run([sys.executable, str(_CLI), *words], check=False).returncode
        if code:
            raise PipelineError(
                f"the demo stopped at `{words[0]}` (exit code {code})",
                hint="its own error is above; `make demo` again goes on from there",
            )
    return demo_lines(RunFolder(Path("runs") / name), time.monotonic() - start)
