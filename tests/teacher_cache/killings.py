"""Writers of the recorded teacher that are killed at their work, or work at once. Also the program in which they do.

python -m tests.teacher_cache.killings sweep FOLDER TEACHER
python -m tests.teacher_cache.killings race FOLDER TEACHER
python -m tests.teacher_cache.killings stored URL TEACHER EVERY
    python -m tests.teacher_cache.killings together URL TEACHER SIGNALS
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from shards.durable import LocalDisk
from shards.object_cache import ObjectCache
from shards.remote import RemoteStorage
from stages.corpus.sample import Sample
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.signals import TeacherSignal
from tests.teacher_cache import recorded
from tests.teacher_cache.recorded import fill, make_corpus


def told(verb: str, *words: object) -> int:
    """What the program prints, in a process that has no threads yet."""
    command = [sys.executable, "-m", __name__, verb, *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def sweep(folder: Path, teacher: Path) -> int:
    """Die by SIGKILL at the n-th file operation, for every n, each time in a new folder; then finish there undisturbed.

    Forks, after one run in this process, so that a death costs neither imports nor first calls. Returns how many
    deaths there were.
    """
    torch.set_num_threads(1)
    fill(folder / "000", teacher)
    for deaths in range(1, 1_000):
        target = folder / f"{deaths:03d}"
        died = os.WIFSIGNALED(_forked(lambda target=target, n=deaths: _fill_and_die(target, teacher, n)))
        if os.waitstatus_to_exitcode(_forked(lambda target=target: fill(target, teacher))) != 0:
            raise RuntimeError(f"the run after a death at operation {deaths} did not finish")
        if not died:
            return deaths - 1
    raise RuntimeError("it never came to an end")


def stored(url: str, teacher: Path, every: int) -> int:
    """Die by SIGKILL at the n-th request to a store, for every so many-th n, then finish there undisturbed.

    The sets lie at 000 (undisturbed), 001, … under the URL. Returns how many deaths there were. This process never
    speaks to the store: its client has threads, which a fork would lose.
    """
    torch.set_num_threads(1)
    base, options = url.split("?")
    with tempfile.TemporaryDirectory() as warm:
        fill(Path(warm), teacher)
    for deaths, at in enumerate(itertools.count(1, every), 1):
        target = f"{base}/{at:03d}?{options}"
        died = os.WIFSIGNALED(_forked(lambda target=target, at=at: _store_and_die(target, teacher, at)))
        if os.waitstatus_to_exitcode(_forked(lambda target=target: fill(target, teacher))) != 0:
            raise RuntimeError(f"the run after a death at request {at} did not finish")
        if not died:
            return deaths - 1
    raise RuntimeError("it never came to an end")


def race(folder: Path, teacher: Path) -> int:
    """Let one writer, then two, then three at once work in one folder; kill them at random; then let two finish.

    None of those to be killed gets past the last sample of the plan, so that the kill finds every one of them at work,
    however slow the machine makes the killer. Returns how many were killed before they were done.
    """
    torch.set_num_threads(1)
    rng, killed, last_id = random.Random(11), 0, make_corpus(teacher).dev[-1].sample_id

    def dawdle(sample: Sample) -> None:
        time.sleep(600 if sample.sample_id == last_id else 0.05)

    for writers in (1, 2, 3):
        children = [_begin(lambda: fill(folder, teacher, before=dawdle)) for _ in range(writers)]
        for child in children:
            time.sleep(rng.uniform(0.05, 0.3))
            os.kill(child, signal.SIGKILL)
        killed += sum(os.WIFSIGNALED(_end(child)) for child in children)
    last = [_begin(lambda: fill(folder, teacher)) for _ in range(2)]
    codes = [_end(child) for child in last]
    if any(codes):
        raise RuntimeError("an undisturbed writer failed")
    return killed


def together(url: str, teacher: Path, signals: str) -> int:
    """Let three writers fill one place in a store at once; returns how many were done, not refused.

    `signals` are the "same" for all, or each writer's "own", as of machines that differ in the last bits.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm:
        fill(Path(warm), teacher)
    writers = [_begin(lambda n=n: _store_own(url, teacher, n if signals == "own" else 0)) for n in range(3)]
    return sum(_end(writer) == 0 for writer in writers)


def _store_own(url: str, teacher: Path, bits: int) -> None:
    said = recorded.recorded_signal

    def differing(sample: Sample, spec: CaptureSpec) -> TeacherSignal:
        signal = said(sample, spec)
        return dataclasses.replace(signal, entropy_N=signal.entropy_N * (1 + bits * 2.0**-20))

    recorded.recorded_signal = differing
    fill(url, teacher)


def _fill_and_die(folder: Path, teacher: Path, at: int) -> None:
    """Count every operation of the disk, from both threads, and die before the `at`-th is carried out."""
    counted = _dying(at)
    for name in ("mkdir", "create", "write", "fsync", "link", "unlink", "fsync_folder"):
        setattr(LocalDisk, name, staticmethod(counted(getattr(LocalDisk(), name))))
    fill(folder, teacher)


def _store_and_die(url: str, teacher: Path, at: int) -> None:
    """Count every call of the store's client, from both threads, and die before the `at`-th is carried out."""
    counted, opened = _dying(at), RemoteStorage.at

    class Client:
        def __init__(self, client: object) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Callable[..., object]:
            return counted(getattr(self._client, name))

    def dying(url: str, *, cache: ObjectCache) -> RemoteStorage:
        storage = opened(url, cache=cache)
        storage._files = Client(storage._files)
        return storage

    RemoteStorage.at = staticmethod(dying)
    fill(url, teacher)


def _dying(at: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Wraps functions such that the process dies before their `at`-th call, all counted together."""
    left = at

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments)

        return call

    return counted


def _forked(work: Callable[[], object]) -> int:
    return _end(_begin(work))


def _begin(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _end(child: int) -> int:
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    if sys.argv[1] == "stored":
        print(stored(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
    elif sys.argv[1] == "together":
        print(together(sys.argv[2], Path(sys.argv[3]), sys.argv[4]))
    else:
        print({"sweep": sweep, "race": race}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3])))
