"""Synthetic records with full distributions behind them, sets of them, and what several tests do to either."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.contract import AttentionSpec, Contract, Selection
from shards.manifest import begin, publish_teacher_files, seal
from shards.object_cache import ObjectCache
from shards.record import AttentionSummary, Record
from shards.writer import build_shard, write_shard
from tests.shards.disks import CountingDisk, DeadlyDisk, FailingDisk, ForgetfulDisk
from tests.shards.object_store import CREDENTIALS, ObjectStore, serving

CONTRACT = Contract(
    codec="topk-planes/1",
    teacher="a teacher",
    teacher_fingerprint="1" * 64,
    tokenizer_fingerprint="2" * 64,
    vocab_size=300,
    start_token_id=0,
    end_token_id=2,
    selection=Selection(kind="topk", k=4),
    attention=AttentionSpec(layers=(0, 3), top_m=3),
    corpus_fingerprint="3" * 64,
    engine="synthetic 1",
    dtype="float32+float32",
)


def synthetic_record(contract: Contract, seed: int, *, prompt: int = 6, response: int = 5, first: int = 0) -> Record:
    """What a teacher with random logits would say: sharp and flat positions, exact masses."""
    rng = np.random.default_rng(seed)
    positions = response - first
    scale_N1 = rng.choice([0.3, 2.0, 8.0], (positions, 1))
    logits_NV = rng.standard_normal((positions, contract.vocab_size)) * scale_N1
    logprobs_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    order_NV = np.argsort(-logprobs_NV, axis=1, kind="stable")
    falling_NV = np.take_along_axis(logprobs_NV, order_NV, 1)
    with np.errstate(divide="ignore"):
        log_tail_N = np.logaddexp.reduce(falling_NV[:, contract.selection.k :], axis=1, initial=-np.inf)
    return Record(
        sample_id=f"sample-{seed}",
        prompt_ids_P=rng.integers(0, contract.vocab_size, prompt, np.int32),
        response_ids_R=rng.integers(0, contract.vocab_size, response, np.int32),
        first_position=first,
        ids_NK=order_NV[:, : contract.selection.k].astype(np.int32),
        logprobs_NK=falling_NV[:, : contract.selection.k].astype(np.float32),
        log_tail_N=log_tail_N.astype(np.float32),
        entropy_N=-(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1).astype(np.float32),
        attention=_synthetic_attention(contract.attention, rng, positions, prompt),
    )


def _synthetic_attention(
    spec: AttentionSpec | None, rng: np.random.Generator, positions: int, prompt: int
) -> AttentionSummary | None:
    if spec is None:
        return None
    rows_LNA = rng.dirichlet(np.full(prompt + 3, 0.3), (len(spec.layers), positions))
    keys_LNP = rows_LNA[..., 1:prompt]
    kept = min(spec.top_m, prompt - 1)
    order_LNM = np.argsort(-keys_LNP, axis=-1, kind="stable")[..., :kept]
    padding = ((0, 0), (0, 0), (0, spec.top_m - kept))
    logs_LNA = np.log(np.maximum(rows_LNA, 1e-30))
    return AttentionSummary(
        positions_LNM=np.pad((order_LNM + 1).astype(np.int32), padding, constant_values=-1),
        weights_LNM=np.pad(np.take_along_axis(keys_LNP, order_LNM, -1).astype(np.float32), padding),
        sink_LN=rows_LNA[..., 0].astype(np.float32),
        prompt_LN=keys_LNP.sum(axis=-1).astype(np.float32),
        entropy_LN=-(rows_LNA * logs_LNA).sum(axis=-1).astype(np.float32),
    )


@pytest.fixture(scope="session")
def contract() -> Contract:
    return CONTRACT


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return synthetic_record


@pytest.fixture(scope="session")
def records() -> list[Record]:
    """Three records of different lengths; one is a one-token response, one starts after its first token."""
    return [
        synthetic_record(CONTRACT, 0),
        synthetic_record(CONTRACT, 1, prompt=2, response=1),
        synthetic_record(CONTRACT, 2, prompt=9, response=7, first=2),
    ]


@pytest.fixture
def shard(tmp_path: Path, contract: Contract, records: list[Record]) -> Path:
    path = tmp_path / "train-00000.arrow"
    path.write_bytes(build_shard("train-00000", "train", contract, records))
    return path


@pytest.fixture(scope="session")
def written() -> list[Record]:
    """Seven records of train, in order, of different lengths."""
    return [synthetic_record(CONTRACT, seed, prompt=3 + seed, response=2 + seed % 4) for seed in range(7)]


@pytest.fixture(scope="session")
def make_set(written: list[Record]) -> Callable[..., Path]:
    """Make a sealed set in a folder: three shards of train, one of dev, one teacher file."""

    def make(folder: Path, tokenizer: str = "{}") -> Path:
        begin(folder, CONTRACT)
        publish_teacher_files(folder, {"tokenizer.json": tokenizer.encode()})
        infos = [
            write_shard(folder, f"train-{number}", "train", CONTRACT, written[start : start + 3])
            for number, start in enumerate(range(0, 7, 3))
        ]
        infos.append(write_shard(folder, "dev-0", "dev", CONTRACT, [synthetic_record(CONTRACT, 99)]))
        seal(folder, CONTRACT, infos)
        return folder

    return make


@pytest.fixture
def folder(tmp_path: Path, make_set: Callable[[Path], Path]) -> Path:
    return make_set(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    """Where objects of a store are kept."""
    return ObjectCache(tmp_path / "cache", limit=1 << 20)


def require_same(left: Record, right: Record) -> None:
    """Every field of two records is equal, to the bit."""
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, AttentionSummary):
            for part in dataclasses.fields(a):
                np.testing.assert_array_equal(getattr(a, part.name), getattr(b, part.name), strict=True)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, strict=True)
        else:
            assert a == b, field.name


@pytest.fixture(scope="session")
def same() -> Callable[[Record, Record], None]:
    return require_same


@pytest.fixture(scope="session")
def disks() -> dict[str, type[CountingDisk]]:
    return {"counting": CountingDisk, "deadly": DeadlyDisk, "failing": FailingDisk, "forgetful": ForgetfulDisk}


@pytest.fixture(scope="session")
def refusals() -> tuple[int, ...]:
    return (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], None]], int]:
    """Run a function in a forked process for at most a minute; return the signal that ended it, or 0."""

    def run(function: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                function()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    return run


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """An S3 server."""
    with pytest.MonkeyPatch.context() as environment, serving() as store:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        yield store


@pytest.fixture
def url(store: ObjectStore) -> str:
    """A place in it where nothing is; it refuses nothing."""
    store.refuse()
    return store.new_url()
