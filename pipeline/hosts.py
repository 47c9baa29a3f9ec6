"""Training over several machines: DeepSpeed's launcher over the hosts of a hostfile.

A hostfile names a machine a line, with the ranks it takes: `worker-1 slots=4`. Every machine must be reachable by ssh
without a password and see this project, the run and the shards at the same paths; pdsh must be installed here. All of
that is checked before anything starts. What the machines have may differ from what this one has: each rank looks for
itself. DeepSpeed is asked by its command, so nothing of it is imported here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.launch import rank_command
from pipeline.rank import failure_of, forget_failure
from pipeline.run import RunFolder
from stages.distill.settings import possible_ranks

_LINE = re.compile(r"(?P<name>[\w.-]+)\s+slots=(?P<slots>[1-9]\d*)")
_ANSWER_S = 10
_NOT_REACHED = 255
"""ssh's own exit code; any other is of the command that it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    name: str
    slots: int
    """Ranks it takes: its GPUs."""


def read_hosts(file: Path, global_batch: int) -> list[Host]:
    """The machines of a hostfile.

    Raises UsageError naming the line that is wrong, or where the slots in all do not divide the global batch.
    """
    if not file.is_file():
        raise UsageError(f"no hostfile {file}", hint="write one line a machine: worker-1 slots=4")
    hosts: list[Host] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None or found["name"] in {host.name for host in hosts}:
            raise UsageError(f"{file}, line {number}: {line.strip()!r}", hint="one line a machine: worker-1 slots=4")
        hosts.append(Host(name=found["name"], slots=int(found["slots"])))
    if not hosts:
        raise UsageError(f"{file} names no machine", hint="write one line a machine: worker-1 slots=4")
    ranks = sum(host.slots for host in hosts)
    if global_batch % ranks:
        possible = ", ".join(map(str, possible_ranks(global_batch, global_batch)))
        raise UsageError(
            f"{file} has {ranks} slots, which do not divide the global batch of {global_batch} records",
            hint=f"the slots of all machines together can be {possible}",
        )
    return hosts


def check_hosts(hosts: list[Host], run: RunFolder, shards: Path | str) -> None:
    """Ask every machine whether it answers, and sees this interpreter, this run and its shards (those in a folder).

    Raises PipelineError naming every machine that does not, before anything is started.
    """
    if shutil.which("pdsh") is None:
        raise PipelineError(
            "pdsh, by which DeepSpeed starts ranks on other machines, is not installed here",
            hint="apt-get install pdsh, or train on this machine with GPUS=n",
        )
    needed = [sys.executable, str(run.recipe_file.resolve()), *([str(shards)] if isinstance(shards, Path) else [])]
    seen = " && ".join(f"test -e {shlex.quote(path)}" for path in needed)
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = dict(
            zip([host.name for host in hosts], pool.map(lambda host: _ask(host.name, seen), hosts), strict=True)
        )
    if silent := [f"{name} ({said})" for name, (code, said) in answers.items() if code == _NOT_REACHED]:
        raise PipelineError(
            f"no answer by ssh from {', '.join(silent)}",
            hint="ssh to it must work without a password; or take it out of the hostfile",
        )
    if blind := [name for name, (code, _) in answers.items() if code]:
        raise PipelineError(
            f"{', '.join(blind)} does not see all of {', '.join(needed)}",
            hint="keep the project, its runs and their shards on storage that all machines share, at the same path",
        )


def _ask(host: str, command: str) -> tuple[int, str]:
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_S}", host, command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=3 * _ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return _NOT_REACHED, "no answer in time"
    except OSError as error:
        return _NOT_REACHED, str(error)
    return done.returncode, (done.stderr.strip().splitlines() or ["it says nothing"])[-1]


def run_on_hosts(run: RunFolder, shards: Path | str, hosts: list[Host], *, tracker: str) -> None:
    """Train with one rank a slot. Signals are passed on as `run_ranks` does.

    Raises PipelineError with the message and hint of the rank that failed first.
    """
    forget_failure(run)
    with tempfile.TemporaryDirectory() as folder:
        hostfile, variables = Path(folder) / "hosts", Path(folder) / "environment"
        hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")
        variables.write_text("".join(f"{name}={value}\n" for name, value in _carried().items()), encoding="utf-8")
        flags = ["--hostfile", str(hostfile), "--force_multi", "--launcher_args=-N", "--master_port", str(_free_port())]
        words = [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--quiet", "--no_local_rank", "--module"]
        launcher = subprocess.Popen(
            [*words, *rank_command(run, shards, tracker)[1:]],
            env={**os.environ, "DS_ENV_FILE": str(variables)},
            start_new_session=True,
        )
        with _passing_signals_to(launcher) as asked:
            code = launcher.wait()
    if asked:
        sys.exit(128 + asked[0])
    if code:
        raise failure_of(run, f"DeepSpeed's launcher ended with exit code {code}")


def _carried() -> dict[str, str]:
    """What the ranks are to find in their environment besides what DeepSpeed carries."""
    name = "MINICODFORMER_DEBUG"
    return {name: os.environ[name]} if name in os.environ else {}


def _free_port() -> int:
    """Free here, which is as much as can be known of the first host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _passing_signals_to(launcher: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C ask the launcher to end, which asks every rank; yields what was asked."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        launcher.terminate()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
