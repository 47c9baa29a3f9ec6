"""A small shard set made by a random but consistent teacher, a small student, and one process group for all tests."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from safetensors.torch import load_file

from shards.contract import AttentionSpec, Contract, Selection
from shards.manifest import HEAD_PCA_FILE, HEAD_PCA_TENSOR, begin, seal
from shards.record import AttentionSummary, Record
from shards.writer import write_shard
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.train import TrainResult, train
from stages.events import Event, Metric
from stages.student.shape import StudentShape

sys.path.append(str(Path(__file__).parent))  # so that child processes find rank_worker
import rank_worker

VOCAB, K, TOP_M, LAYERS = 211, 8, 4, 2
START, END = 0, 1

MakeShards = Callable[..., Path]


def make_contract(**changes: object) -> Contract:
    fields: dict[str, object] = {
        "codec": "topk-planes/1",
        "teacher": "tiny",
        "teacher_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
        "vocab_size": VOCAB,
        "start_token_id": START,
        "end_token_id": END,
        "selection": Selection(kind="topk", k=K),
        "attention": AttentionSpec(layers=(3, 7), top_m=TOP_M),
        "corpus_fingerprint": "c" * 64,
        "engine": "none 0",
        "dtype": "float32+float32",
    }
    return Contract(**{**fields, **changes})  # type: ignore[arg-type]


def make_record(index: int, seed: int, *, attention: bool = True) -> Record:
    """The teacher is a bigram: its distribution depends on the token before, so that there is something to learn."""
    rng = np.random.default_rng([seed, index])
    table = np.random.default_rng(7).normal(size=(VOCAB, VOCAB)) * 2.5
    prompt = rng.integers(2, VOCAB, rng.integers(1, 9)).astype(np.int32)
    length = int(rng.integers(1, 12))
    response = np.empty(length, np.int32)
    logp = np.empty((length, VOCAB))
    before = int(prompt[-1])
    for position in range(length):
        logits = table[before]
        logp[position] = logits - np.log(np.exp(logits).sum())
        before = int(np.argmax(logits + rng.gumbel(size=VOCAB)))
        response[position] = END if position == length - 1 else before
    ids = np.argsort(-logp, axis=1, kind="stable")[:, :K].astype(np.int32)
    kept = np.take_along_axis(logp, ids, 1)
    rest = np.exp(logp).sum(1) - np.exp(kept).sum(1)
    return Record(
        sample_id=f"sample-{seed}-{index:04d}",
        prompt_ids_P=prompt,
        response_ids_R=response,
        first_position=0,
        ids_NK=ids,
        logprobs_NK=kept.astype(np.float32),
        log_tail_N=np.log(rest).astype(np.float32),
        entropy_N=(-(np.exp(logp) * logp).sum(1)).astype(np.float32),
        attention=make_attention(rng, prompt.size, length) if attention else None,
    )


def make_attention(rng: np.random.Generator, prompt: int, rows: int) -> AttentionSummary:
    raw = rng.dirichlet(np.full(prompt + 1, 0.7), size=(LAYERS, rows))  # the last column is the response's own share
    keys = raw[..., 1:prompt]
    kept = min(TOP_M, prompt - 1)
    order = np.argsort(-keys, axis=-1, kind="stable")[..., :kept]
    positions = np.full((LAYERS, rows, TOP_M), -1, np.int32)
    weights = np.zeros((LAYERS, rows, TOP_M), np.float32)
    positions[..., :kept] = order + 1
    weights[..., :kept] = np.take_along_axis(keys, order, -1)
    return AttentionSummary(
        positions_LNM=positions,
        weights_LNM=weights,
        sink_LN=raw[..., 0].astype(np.float32),
        prompt_LN=keys.sum(-1).astype(np.float32),
        entropy_LN=(-(raw * np.log(raw + 1e-30)).sum(-1)).astype(np.float32),
    )


@pytest.fixture(scope="session")
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Write a sealed shard set of records made by `of`; `changes` are fields of the contract."""

    def make(
        records: int = 40,
        dev: int = 10,
        seed: int = 0,
        of: Callable[..., Record] = make_record,
        **changes: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("shards")
        contract = make_contract(**changes)
        begin(folder, contract)
        teacher = folder / "teacher"
        teacher.mkdir()
        (teacher / "tokenizer.json").write_text("{}", encoding="utf-8")
        components = np.random.default_rng(1).normal(size=(VOCAB, 16)).astype(np.float16)
        save_file({HEAD_PCA_TENSOR: components}, teacher / HEAD_PCA_FILE)
        with_attention = contract.attention is not None
        infos = []
        for split, first, count in (("train", 0, records), ("dev", records, dev)):
            for start in range(0, count, 16):
                chosen = range(first + start, first + min(start + 16, count))
                rows = [of(index, seed, attention=with_attention) for index in chosen]
                infos.append(write_shard(folder, f"{split}-{start:03d}", split, contract, rows))
        seal(folder, contract, infos)
        return folder

    return make


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    return make_shards()


@pytest.fixture(scope="session")
def shape() -> StudentShape:
    return StudentShape(
        hidden_size=16, encoder_layers=2, decoder_layers=2, heads=2, intermediate_size=24, ncp_sparsity=0.5
    )


@pytest.fixture(scope="session")
def settings() -> DistillSettings:
    return DistillSettings(
        epochs=3,
        global_batch=12,
        micro_batch=6,
        learning_rate=3e-3,
        zero_stage=3,
        precision="fp32",
        checkpoint_every=3,
        validate_every=5,
        answers=0,  # the tokenizer of these shards is none
    )


@pytest.fixture(scope="session")
def objective() -> ObjectiveSettings:
    return ObjectiveSettings()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished, stopped or dead run left behind."""

    run: Path
    result: TrainResult | None
    events: list[Event]
    error: Exception | None = None
    rates: list[tuple[tuple[float, float], ...]] = dataclasses.field(default_factory=list)
    """Learning rate and decay of every group, at every call of a step; of ranks in processes of their own."""
    exit_codes: list[int | None] = dataclasses.field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """The loss of every step that was taken."""
        return self._metric("loss")

    @property
    def grad_norms(self) -> dict[int, float]:
        return self._metric("grad_norm")

    def _metric(self, name: str) -> dict[int, float]:
        metrics = [event for event in self.events if isinstance(event, Metric)]
        return {metric.step: metric.values[name] for metric in metrics if name in metric.values}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run / "final_model" / "model.safetensors")


Arguments = dict[str, Any]


@pytest.fixture(scope="session")
def arguments(shards: Path, settings: DistillSettings, objective: ObjectiveSettings, shape: StudentShape) -> Arguments:
    """All that `train` wants but the run directory."""
    return {"shards": shards, "settings": settings, "objective": objective, "shape": shape}


@pytest.fixture(scope="session")
def train_here(arguments: Arguments) -> Callable[..., Outcome]:
    """Train in this process, on one thread, as its only rank; settings can be changed by name."""

    def run(folder: Path, *, emit: Callable[[Event], None] | None = None, **changes: Any) -> Outcome:
        torch.set_num_threads(1)  # as the processes of `start_ranks`: another number adds up in another order
        events: list[Event] = []

        def hear(event: Event) -> None:
            events.append(event)
            if emit:
                emit(event)

        result = train(**with_changes(arguments, changes), run=folder, emit=hear)
        return Outcome(run=folder, result=result, events=events)

    return run


def with_changes(arguments: Mapping[str, Any], changes: Mapping[str, Any]) -> Arguments:
    whole = {name: value for name, value in changes.items() if name in arguments}
    fields = {name: value for name, value in changes.items() if name not in arguments}
    merged = {**arguments, **whole}
    return {**merged, "settings": dataclasses.replace(merged["settings"], **fields)}


@pytest.fixture(scope="session")
def undisturbed(train_here: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One rank, start to finish: what every disturbed run must come to."""
    return train_here(tmp_path_factory.mktemp("undisturbed"))


class Ranks:
    """Ranks of one run, as processes."""

    def __init__(self, processes: list[BaseProcess], ears: list[Connection], run: Path) -> None:
        self._processes, self._ears, self._run = processes, ears, run

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def ask_last_to_stop(self) -> None:
        self._processes[-1].terminate()

    def hear(self) -> Event | TrainResult | Exception | None:
        """The next thing rank 0 says; None when it is gone."""
        try:
            said: Event | TrainResult | Exception = self._ears[0].recv()
        except (EOFError, ConnectionResetError):
            return None
        return said

    def join(self) -> Outcome:
        events: list[Event] = []
        rates: list[tuple[tuple[float, float], ...]] = []
        result, error = None, None
        while (said := self.hear()) is not None:
            if isinstance(said, TrainResult):
                result = said
            elif isinstance(said, Exception):
                error = said
            elif isinstance(said, rank_worker.Rates):
                rates.append(said.groups)
            else:
                events.append(said)
        for process in self._processes:
            process.join()
        codes = [process.exitcode for process in self._processes]
        return Outcome(run=self._run, result=result, events=events, error=error, rates=rates, exit_codes=codes)


StartRanks = Callable[..., Ranks]


@pytest.fixture(scope="session")
def start_ranks(arguments: Arguments) -> StartRanks:
    """Train in processes of their own, forked from one that has everything imported: a second instead of ten."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rank_worker", "deepspeed"])

    def start(folder: Path, world: int, *, die_at_flush: int = 0, **changes: Any) -> Ranks:
        port = rank_worker.free_port()
        processes: list[BaseProcess] = []
        ears = []
        for rank in range(world):
            ear, mouth = server.Pipe(duplex=False)
            chosen = {**with_changes(arguments, changes), "run": folder}
            process = server.Process(
                target=rank_worker.run_rank, args=(rank, world, port, chosen, mouth, die_at_flush), daemon=True
            )
            process.start()
            mouth.close()
            processes.append(process)
            ears.append(ear)
        return Ranks(processes, ears, folder)

    return start


@pytest.fixture(scope="session", autouse=True)
def one_process_world() -> Iterator[None]:
    """DeepSpeed remembers the first process group it saw, so all tests of this process share one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():  # vLLM's engines, in other rooms' tests, tear down whatever group there is
        dist.destroy_process_group()
