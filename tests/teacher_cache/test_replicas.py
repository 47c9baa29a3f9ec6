"""Several replicas, real processes under Ray: what they leave behind when they are killed, and when they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.launch import Machine
from pipeline.replicas import replicas
from shards.manifest import is_sealed
from shards.planes.codec import Planes3
from shards.reader import ShardSet
from shards.record import Record
from shards.shard import ShardReader
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Event, Metric, Note, Progress
from stages.teacher_cache.cache import fill_cache
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.prompt_logprobs import PromptLogprobsEngine
from stages.teacher_cache.replica import InProcess, ReplicaDied, Spread
from stages.teacher_cache.settings import CacheSettings, TeacherSettings
from stages.teacher_cache.tables_of_set import _captured
from tests.teacher_cache.folders import contents


@pytest.fixture(scope="module")
def two() -> Iterator[Spread]:
    """Ray with two replicas a run; without a GPU it starts once for all tests here."""
    with replicas(2, 1, Machine(gpus=0, cores=2), [1]) as spread:
        yield spread


def warnings(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and event.level == "warning"]


def test_W3_replicas_killed_at_random_leave_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread
) -> None:
    corpus = recorded.make_corpus(recorded_teacher, train=50, dev=6)
    recorded.fill(tmp_path / "undisturbed", recorded_teacher, corpus=corpus)
    events: list[Event] = []
    killer, deaths = recorded.Killer(tmp_path, deaths=4), tmp_path.glob("shot-*")
    recorded.fill(tmp_path / "killed", recorded_teacher, corpus=corpus, spread=two, before=killer, emit=events.append)
    assert len(list(deaths)) == 4
    assert len([text for text in warnings(events) if "killed or crashed" in text]) == 4
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.done == last.total, "what a dead replica had captured does not count twice"
    (*_, speeds) = (event.values for event in events if isinstance(event, Metric))
    assert speeds.keys() == {"replica_0_tokens_per_s", "replica_1_tokens_per_s"}


def test_ctrl_c_drops_the_units_under_way_and_leaves_no_process_behind(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path
) -> None:
    """As a terminal sends it: to the whole group. The same command then goes on to an undisturbed run's bytes."""
    folder = tmp_path / "stopped"
    words = [sys.executable, recorded.__file__, str(folder), str(recorded_teacher)]
    program = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)
    family = psutil.Process(program.pid)
    children: list[psutil.Process] = []
    while not list(folder.glob("*.arrow")) or sum(_is_replica(child) for child in children) < 2:
        assert program.poll() is None, program.stderr.read() if program.stderr else ""
        time.sleep(0.05)
        children = family.children(recursive=True)
    os.killpg(program.pid, signal.SIGINT)
    _, said = program.communicate(timeout=120)
    assert program.returncode != 0
    assert said.rstrip().endswith("KeyboardInterrupt"), said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert not is_sealed(folder)
    assert list(folder.rglob("*.tmp")) == []
    published = sorted(folder.glob("*.arrow"))
    for path in published:
        with ShardReader.open(path) as shard:
            shard.verify()
    engines: list = []
    corpus = recorded.make_corpus(recorded_teacher, train=50, dev=6)
    recorded.fill(folder, recorded_teacher, corpus=corpus, engines=engines)
    recorded.fill(tmp_path / "undisturbed", recorded_teacher, corpus=corpus)
    assert len(engines[0].captured) < 56, "what was published is not captured again"
    assert contents(folder) == contents(tmp_path / "undisturbed")


def _is_replica(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::_Host")
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
def test_vllm_in_two_replicas_leaves_the_bytes_of_one(
    tmp_path: Path, recorded: ModuleType, tiny_qwen3: Path, recorded_teacher: Path, two: Spread
) -> None:
    """The real engine and codec, one core a replica."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(recorded_teacher / name, tiny_qwen3 / name)
    settings = TeacherSettings(
        model="tiny", dtype="float32", head_dtype="float32", max_model_len=64, max_batched_tokens=64
    )
    cache = CacheSettings(k=8, curve=(0.5, 0.25), attention_top_m=3, records_per_shard=4, pca_width=6)
    corpus, events = recorded.make_corpus(tiny_qwen3, train=30, dev=6), list[Event]()
    for folder, spread in (("one", lambda order: two(order)[:1]), ("two", two)):
        fill_cache(
            corpus=corpus,
            teacher=settings,
            cache=cache,
            teacher_folder=tiny_qwen3,
            target=tmp_path / folder,
            emit=events.append,
            spread=spread,
        )
    assert warnings(events) == []
    assert any("2 replicas of vllm" in event.text for event in events if isinstance(event, Note))
    shards = ShardSet(tmp_path / "two")
    assert shards.contract.codec == Planes3.name
    assert shards.manifest.totals()["records"] == 36
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_records_that_no_replica_survives_are_rejected_and_the_rest_goes_on(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread
) -> None:
    """One kills the process, the other makes the engine raise: then too the process is not to be trusted."""
    folder, events = tmp_path / "shards", list[Event]()
    corpus = recorded.make_corpus(recorded_teacher, train=8, dev=5)
    killer = recorded.Killer(tmp_path, poison=frozenset({6}))

    def misbehave(sample: object) -> None:
        if sample.sample_id == f"{12:016x}":  # type: ignore[attr-defined]
            raise ZeroDivisionError("device-side assert")
        killer(sample)

    recorded.fill(folder, recorded_teacher, corpus=corpus, spread=two, before=misbehave, emit=events.append)
    assert rejects(folder, "train-00001") == [(6, "train", 6, "its process was killed or crashed")]
    assert rejects(folder, "dev-00001") == [(12, "dev", 4, "ZeroDivisionError: device-side assert")]
    deaths = len(list(tmp_path.glob("poisoned-*")))
    assert deaths == 3 + 1 + 3, "the unit three times, the half that holds it once, the record three times"
    assert sorted(path.stem for path in folder.glob("*.arrow")) == ["dev-00000", "train-00000", "train-00001"]
    shards = ShardSet(folder)
    assert [int(record.sample_id, 16) for record in shards.split("train")] == [0, 1, 2, 3, 4, 5, 7]
    assert [int(record.sample_id, 16) for record in shards.split("dev")] == [8, 9, 10, 11]
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.done == last.total
    before, engines = contents(folder), list[object]()
    recorded.fill(folder, recorded_teacher, corpus=corpus, engines=engines)
    assert engines[0].captured == []  # type: ignore[attr-defined]
    assert contents(folder) == before


def rejects(folder: Path, unit: str) -> list[tuple[int, str, int, str]]:
    lines = map(json.loads, (folder / f"{unit}.rejects-1.jsonl").read_text("utf-8").splitlines())
    return [(int(line["sample_id"], 16), line["split"], line["index"], line["reason"]) for line in lines]


def test_the_codec_learns_from_what_survives(recorded: ModuleType, recorded_teacher: Path) -> None:
    """What was captured before a death is kept, and a sample that takes three replicas with it is left out."""
    corpus = recorded.make_corpus(recorded_teacher)
    spec = CaptureSpec(selection=recorded.CACHE.chosen(), attention=recorded.CACHE.attention(4))
    engine = recorded.RecordedEngine(spec)
    asked: list[list[int]] = []

    class Mortal(InProcess):
        name = "replica 0"

        def __init__(self) -> None:
            self._engine, self._notes = engine, []

        def run(self, samples: Sequence[Sample]) -> Iterator[Record | Note]:
            asked.append([int(sample.sample_id, 16) for sample in samples])
            for number, said in zip(asked[-1], super().run(samples), strict=False):
                if number == 2:
                    raise ReplicaDied("killed")
                yield said

    records = _captured(corpus.train[:5], Mortal(), lambda _: None)
    assert [int(record.sample_id, 16) for record in records] == [0, 1, 3, 4]
    assert asked == [[0, 1, 2, 3, 4], [2, 3, 4], [2, 3, 4], [3, 4]]
    with pytest.raises(StageError, match="every sample"):
        _captured(corpus.train[2:3], Mortal(), lambda _: None)


def test_a_unit_short_of_rejected_records_is_resumed_without_them(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path
) -> None:
    recorded.fill(tmp_path, recorded_teacher)
    for name in ("manifest.json", "train-00000.arrow"):
        (tmp_path / name).unlink()
    (tmp_path / "train-00000.rejects-1.jsonl").write_text(json.dumps({"sample_id": f"{1:016x}"}) + "\n")
    engines: list = []
    recorded.fill(tmp_path, recorded_teacher, engines=engines)
    assert [int(name, 16) for name in engines[0].captured] == [0, 2, 3]
    (tmp_path / "manifest.json").unlink()
    recorded.fill(tmp_path, recorded_teacher, engines=engines)
    assert engines[1].captured == [], "a shard without its rejected records is whole"


def test_W4_what_the_stage_refuses_in_a_replica_reaches_the_caller_and_seals_nothing(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread
) -> None:
    def refuse(sample: object) -> None:
        raise StageError("the teacher is no softmax", hint="take another")

    with pytest.raises(StageError, match="no softmax") as refused:
        recorded.fill(tmp_path, recorded_teacher, spread=two, before=refuse)
    assert refused.value.hint == "take another"
    assert not is_sealed(tmp_path)


def test_what_an_engine_refuses_before_it_loads_reaches_the_caller(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread
) -> None:
    with pytest.raises(StageError, match="nothing else") as refused:
        recorded.fill(tmp_path, recorded_teacher, spread=two, engine=PromptLogprobsEngine)
    assert "cache.attention_depths = []" in refused.value.hint


def test_a_replica_that_dies_before_it_says_what_it_runs_ends_the_run(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread
) -> None:
    def die(*_: object) -> object:
        return os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(StageError, match="replica 0 died before it had said what it runs: its process was killed"):
        recorded.fill(tmp_path, recorded_teacher, spread=two, engine=die)


def test_a_teacher_that_never_comes_up_ends_the_run(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, two: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: object) -> None:
        recorded.Killer(tmp_path)._kill("starting")

    monkeypatch.setattr(recorded.RecordedEngine, "start", die)
    with pytest.raises(StageError, match="died 3 times before it had loaded the teacher"):
        recorded.fill(tmp_path / "shards", recorded_teacher, spread=lambda order: two(order)[:1])
    assert len(list(tmp_path.glob("starting-*"))) == 3
    assert not is_sealed(tmp_path / "shards")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("worker: CUDA out of memory")])
def test_out_of_memory_halves_the_token_budget_and_says_so(
    tmp_path: Path, recorded: ModuleType, recorded_teacher: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    recorded.fill(tmp_path / "roomy", recorded_teacher)
    budgets: list[int] = []

    def short_of_memory(folder: Path, settings: object, spec: object) -> object:
        def fail(sample: object) -> None:
            if sample.sample_id == f"{5:016x}" and settings.max_batched_tokens > 600:  # type: ignore[attr-defined]
                raise error

        budgets.append(settings.max_batched_tokens)  # type: ignore[attr-defined]
        return recorded.RecordedEngine(spec, fail)

    events: list[Event] = []
    recorded.fill(tmp_path / "tight", recorded_teacher, engine=short_of_memory, emit=events.append)
    assert budgets == [2_048, 1_024, 512]
    assert [text for text in warnings(events) if "a step has" in text] == [
        f"the replica: out of memory: from here on a step has {budget} tokens, half of what it had"
        for budget in budgets[1:]
    ]
    assert contents(tmp_path / "tight") == contents(tmp_path / "roomy")


def test_memory_that_never_suffices_ends_the_run(tmp_path: Path, recorded: ModuleType, recorded_teacher: Path) -> None:
    def fail(sample: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    with pytest.raises(StageError, match=r"even with 64 tokens a step: CUDA out of memory\. Tried") as ended:
        recorded.fill(tmp_path, recorded_teacher, before=fail)
    assert "tensor_parallel" in ended.value.hint


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PipelineError, match=address) as refused, replicas(2, 1, Machine(gpus=0, cores=2), [1]):
        pass
    assert "`.venv/bin/ray start --head`" in refused.value.hint
