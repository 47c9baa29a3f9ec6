"""A teacher that replays: signals that depend on the sample alone, no model behind them.

Also a program that works with two replicas, slowly enough to be stopped: recorded.py FOLDER TEACHER
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.launch import Machine
from pipeline.replicas import replicas
from shards.manifest import Manifest
from shards.storage import Location
from stages.corpus.fingerprint import tokenizer_fingerprint
from stages.corpus.sample import Sample
from stages.corpus.store import Corpus
from stages.events import Emit, silent
from stages.teacher_cache.cache import fill_cache
from stages.teacher_cache.engines.protocol import CaptureSpec, EngineFactory
from stages.teacher_cache.replica import Spread, in_process
from stages.teacher_cache.settings import CacheSettings, TeacherSettings
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal

VOCABULARY = 300
CACHE = CacheSettings(k=5, attention_depths=(0.5,), attention_top_m=3, records_per_shard=4, pca_width=6)


class RecordedEngine:
    """A TeacherEngine without a teacher. `before` is called with each sample and may fail or wait."""

    def __init__(self, spec: CaptureSpec, before: Callable[[Sample], None] = lambda _: None) -> None:
        self._spec, self._before = spec, before
        self.captured: list[str] = []
        self.closed = False

    identity = "recorded 1"
    dtype = "float32+float32"

    def start(self) -> None:
        pass

    def capture(self, samples: Sequence[Sample]) -> Iterator[TeacherSignal]:
        for sample in samples:
            self._before(sample)
            self.captured.append(sample.sample_id)
            yield recorded_signal(sample, self._spec)

    def full(self, samples: Sequence[Sample]) -> Iterator[tuple[TeacherSignal, torch.Tensor]]:
        for sample in samples:
            yield (
                recorded_signal(sample, self._spec),
                recorded_logprobs(sample, torch.Generator().manual_seed(int(sample.sample_id, 16))).float(),
            )

    def close(self) -> None:
        self.closed = True


class Killer:
    """Kills the process that it is called in: the first `deaths` of them at a random sample, and any at a poison."""

    def __init__(self, folder: Path, deaths: int = 0, poison: frozenset[int] = frozenset()) -> None:
        self._folder, self._deaths, self._poison = folder, deaths, poison
        self._left: int | None = None

    def __call__(self, sample: Sample) -> None:
        if int(sample.sample_id, 16) in self._poison:
            self._kill("poisoned")
        if self._left is None:
            number = next((number for number in range(self._deaths) if self._claim(number)), None)
            self._left = 10**9 if number is None else random.Random(number).randint(6, 10)
        self._left -= 1
        if self._left == 0:
            self._kill("shot")
        time.sleep(0.02)

    def _claim(self, number: int) -> bool:
        """Each death is one process's, however many start at once."""
        try:
            (self._folder / f"claimed-{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _kill(self, how: str) -> None:
        (self._folder / f"{how}-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def recorded_logprobs(sample: Sample, generator: torch.Generator) -> torch.Tensor:
    """float64 [N, V]."""
    rows = len(sample.response_ids)
    return (3 * torch.randn(rows, VOCABULARY, generator=generator)).double().log_softmax(dim=-1)


def recorded_signal(sample: Sample, spec: CaptureSpec) -> TeacherSignal:
    """A valid signal drawn from the sample's id."""
    generator = torch.Generator().manual_seed(int(sample.sample_id, 16))
    logprobs = recorded_logprobs(sample, generator)
    kept, ids = logprobs.topk(spec.selection.k, dim=-1)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    return TeacherSignal(
        ids_NK=ids.int(),
        logprobs_NK=kept.float(),
        draws_NK=None,
        log_tail_N=tail.float(),
        entropy_N=-(logprobs.exp() * logprobs).sum(dim=-1).float(),
        curve_NJ=None,
        attention=_recorded_attention(len(sample.response_ids), len(sample.prompt_ids), spec, generator),
    )


def _recorded_attention(rows: int, prompt: int, spec: CaptureSpec, generator: torch.Generator) -> AttentionSignal:
    assert spec.attention is not None
    top_m = spec.attention.top_m
    mean = torch.rand(len(spec.layers), rows, prompt + rows, generator=generator).softmax(dim=-1)
    kept = min(top_m, prompt - 1)
    positions = torch.full((*mean.shape[:2], top_m), -1, dtype=torch.int32)
    weights = torch.zeros((*mean.shape[:2], top_m))
    weights[..., :kept], where = mean[..., 1:prompt].topk(kept, dim=-1)
    positions[..., :kept] = where.int() + 1
    return AttentionSignal(
        positions_LNM=positions,
        weights_LNM=weights,
        sink_LN=mean[..., 0].contiguous(),
        prompt_LN=mean[..., 1:prompt].sum(dim=-1),
        entropy_LN=-torch.xlogy(mean, mean).sum(dim=-1),
    )


def make_corpus(teacher: Path, train: int = 7, dev: int = 2) -> Corpus:
    """Random samples under the teacher's tokenizer."""
    rng = np.random.default_rng(7)
    samples = [
        Sample(
            sample_id=f"{number:016x}",
            prompt_ids=rng.integers(0, VOCABULARY, rng.integers(1, 9)).astype(np.int32),
            response_ids=rng.integers(0, VOCABULARY, rng.integers(1, 12)).astype(np.int32),
        )
        for number in range(train + dev)
    ]
    return Corpus(
        train=samples[:train],
        dev=samples[train:],
        fingerprint="c" * 64,
        tokenizer_fingerprint=tokenizer_fingerprint(teacher),
        start_token_id=0,
        end_token_id=2,
        thinking=True,
        report={},
    )


def fill(
    folder: Location,
    teacher: Path,
    *,
    before: Callable[[Sample], None] = lambda _: None,
    cache: CacheSettings = CACHE,
    emit: Emit = silent,
    engines: list[RecordedEngine] | None = None,
    corpus: Corpus | None = None,
    engine: EngineFactory | None = None,
    spread: Spread = in_process,
) -> Manifest:
    """Run stage one with a recorded teacher; the engine that it made is appended to `engines`."""

    def make(folder: Path, settings: TeacherSettings, spec: CaptureSpec) -> RecordedEngine:
        engine = RecordedEngine(spec, before)
        if engines is not None:
            engines.append(engine)
        return engine

    return fill_cache(
        corpus=corpus or make_corpus(teacher),
        teacher=TeacherSettings(model="recorded"),
        cache=cache,
        teacher_folder=teacher,
        target=folder,
        emit=emit,
        engine=engine or make,
        spread=spread,
    )


def replicated(folder: Path, teacher: Path) -> int:
    """Fill one folder with two replicas; returns how many shards there are."""
    with replicas(2, 1, Machine(gpus=0, cores=2), [1]) as spread:
        corpus = make_corpus(teacher, train=50, dev=6)
        return len(fill(folder, teacher, corpus=corpus, spread=spread, before=lambda _: time.sleep(0.4)).shards)


if __name__ == "__main__":
    print(replicated(Path(sys.argv[1]), Path(sys.argv[2])))
