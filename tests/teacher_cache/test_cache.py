"""The loop: what is on disk after it ran, was killed, failed, or was asked again. The teacher is a recorded one."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from shards.errors import ContractMismatch, Incomplete, InvalidRecord, StorageFailed
from shards.manifest import is_sealed, read_manifest
from shards.reader import ShardSet
from stages.corpus.sample import Sample
from stages.errors import StageError
from stages.events import Event, Note, Progress
from stages.teacher_cache import cache as cache_module
from stages.teacher_cache import job as job_module
from stages.teacher_cache import tables_of_set
from tests.teacher_cache.folders import contents
from tests.teacher_cache.killings import told

UNITS = ["dev-00000.arrow", "train-00000.arrow", "train-00001.arrow"]


@pytest.fixture
def teacher(recorded_teacher: Path) -> Path:
    return recorded_teacher


def test_the_set_holds_every_sample_once_in_plan_order(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    manifest = recorded.fill(tmp_path, teacher)
    corpus = recorded.make_corpus(teacher)
    assert [shard.name for shard in manifest.shards] == UNITS
    assert [shard.records for shard in manifest.shards] == [2, 4, 3]
    shards = ShardSet(tmp_path)
    for split, samples in (("train", corpus.train), ("dev", corpus.dev)):
        records = list(shards.split(split))
        assert [record.sample_id for record in records] == [sample.sample_id for sample in samples]
        for record, sample in zip(records, samples, strict=True):
            assert record.response_ids_R.tolist() == sample.response_ids.tolist()
            assert (record.first_position, record.positions) == (0, len(sample.response_ids))
            signal = recorded.recorded_signal(sample, spec_of(recorded))
            kept = {row: sorted(ids) for row, ids in enumerate(signal.ids_NK.tolist())}
            assert {row: sorted(ids) for row, ids in enumerate(record.ids_NK.tolist())} == kept


def spec_of(recorded: ModuleType) -> object:
    from stages.teacher_cache.engines.protocol import CaptureSpec

    return CaptureSpec(selection=recorded.CACHE.chosen(), attention=recorded.CACHE.attention(4))


def test_the_teacher_travels_with_the_shards(undisturbed: dict[str, bytes], teacher: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert undisturbed[f"teacher/{name}"] == (teacher / name).read_bytes()
    manifest = json.loads(undisturbed["manifest.json"])
    assert set(manifest["teacher_files"]) == {
        "tokenizer.json",
        "chat_template.jinja",
        "chat.json",
        "head_pca.safetensors",
        "fidelity.json",
    }


def test_W3_killed_at_every_file_operation_then_resumed_gives_the_same_bytes(
    tmp_path: Path, teacher: Path, undisturbed: dict[str, bytes]
) -> None:
    assert told("sweep", tmp_path, teacher) >= 6 * len(undisturbed), (
        "each file is at least created, written, synced, linked"
    )
    for folder in sorted(tmp_path.iterdir()):
        assert contents(folder) == undisturbed, folder.name


def test_W3_several_writers_killed_at_random_give_the_same_bytes(
    tmp_path: Path, teacher: Path, undisturbed: dict[str, bytes]
) -> None:
    assert told("race", tmp_path, teacher) == 1 + 2 + 3
    assert contents(tmp_path) == undisturbed


def test_a_resumed_run_captures_only_what_is_missing(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    def fail_at_5(sample: object) -> None:
        if sample.sample_id == f"{5:016x}":  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    engines: list = []
    with pytest.raises(KeyboardInterrupt):
        recorded.fill(tmp_path, teacher, before=fail_at_5, engines=engines)
    assert not is_sealed(tmp_path)
    recorded.fill(tmp_path, teacher, engines=engines)
    assert [int(name, 16) for name in engines[1].captured] == [4, 5, 6, 7, 8]
    assert all(engine.closed for engine in engines)


def test_a_whole_set_starts_no_engine(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    first = recorded.fill(tmp_path, teacher)
    before = contents(tmp_path)
    engines: list = []
    assert recorded.fill(tmp_path, teacher, engines=engines) == first
    assert engines[0].captured == []
    assert contents(tmp_path) == before


def test_W4_a_failing_engine_reaches_the_caller_and_seals_nothing(
    tmp_path: Path, recorded: ModuleType, teacher: Path
) -> None:
    def fail(sample: object) -> None:
        if sample.sample_id == f"{6:016x}":  # type: ignore[attr-defined]
            raise StageError("the teacher broke")

    engines: list = []
    with pytest.raises(StageError, match="the teacher broke"):
        recorded.fill(tmp_path, teacher, before=fail, engines=engines)
    assert engines[0].closed
    assert not is_sealed(tmp_path)
    assert (tmp_path / "train-00000.arrow").exists(), "what was captured before is published"
    assert not (tmp_path / "train-00001.arrow").exists()
    with pytest.raises(Incomplete):
        read_manifest(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["train-00000", "train-00001", "dev-00000"])
def test_W4_a_failing_writer_reaches_the_caller_and_seals_nothing(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    write = job_module.write_shard

    def full(folder: Path, name: str, *rest: object, **named: object) -> object:
        if name == unit:
            raise StorageFailed("no space left on device", hint="make room")
        return write(folder, name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(job_module, "write_shard", full)
    with pytest.raises(StorageFailed, match="no space"):
        recorded.fill(tmp_path, teacher)
    assert not is_sealed(tmp_path)
    assert not (tmp_path / f"{unit}.arrow").exists()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("shard-writer")] == []


def test_W4_a_signal_that_is_no_distribution_is_refused(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable = recorded.recorded_signal

    def broken(sample: object, spec: object) -> object:
        signal = honest(sample, spec)
        return dataclasses.replace(signal, entropy_N=signal.entropy_N * float("nan"))

    monkeypatch.setattr(recorded, "recorded_signal", broken)
    with pytest.raises(InvalidRecord, match="entropy"):
        recorded.fill(tmp_path, teacher)
    assert not is_sealed(tmp_path)


@pytest.mark.timeout(60)
def test_a_slow_writer_holds_the_engine_back_to_two_units(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, may_write = job_module.write_shard, threading.Event()

    def slow(*arguments: object, **named: object) -> object:
        may_write.wait()
        return write(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(job_module, "write_shard", slow)
    engines: list = []
    caller = threading.Thread(target=recorded.fill, args=(tmp_path, teacher), kwargs={"engines": engines})
    caller.start()
    while not engines or len(engines[0].captured) < 1 + 7:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(engines[0].captured) == 1 + 7, "one to learn from, units of 4 and 3 samples; the last one waits"
    may_write.set()
    caller.join()
    assert is_sealed(tmp_path)


@pytest.mark.parametrize(("records_per_shard", "largest"), [(4, 4), (256, 7)])
def test_the_codecs_tables_suit_the_largest_shard_there_will_be(
    tmp_path: Path,
    recorded: ModuleType,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    records_per_shard: int,
    largest: int,
) -> None:
    told: list[int] = []
    budget = tables_of_set.tables_budget
    monkeypatch.setattr(tables_of_set, "tables_budget", lambda positions: told.append(positions) or budget(positions))
    recorded.fill(tmp_path, teacher, cache=dataclasses.replace(recorded.CACHE, records_per_shard=records_per_shard))
    (example, *_) = recorded.make_corpus(teacher).train
    assert told == [largest * len(example.response_ids)]


@pytest.mark.parametrize(
    ("change", "field"),
    [({"k": 6}, "selection"), ({"attention_top_m": 2}, "attention"), ({"attention_depths": (0.25,)}, "attention")],
)
def test_W6_another_contract_is_refused_naming_the_field(
    tmp_path: Path, recorded: ModuleType, teacher: Path, change: dict[str, object], field: str
) -> None:
    recorded.fill(tmp_path, teacher)
    before = contents(tmp_path)
    with pytest.raises(ContractMismatch, match=field):
        recorded.fill(tmp_path, teacher, cache=dataclasses.replace(recorded.CACHE, **change))
    assert contents(tmp_path) == before


def test_W6_another_teacher_is_refused(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    shards, other = tmp_path / "shards", tmp_path / "other"
    recorded.fill(shards, teacher)
    other.mkdir()
    for path in teacher.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_file({"lm_head.weight": torch.ones(300, 16)}, other / "model.safetensors")
    with pytest.raises(ContractMismatch, match="teacher_fingerprint"):
        recorded.fill(shards, other)


def test_fidelity_is_measured_once_on_published_validation_records(
    tmp_path: Path, recorded: ModuleType, teacher: Path
) -> None:
    recorded.fill(tmp_path, teacher)
    report = ShardSet(tmp_path).fidelity()
    corpus = recorded.make_corpus(teacher)
    assert report["positions"] == sum(len(sample.response_ids) for sample in [*corpus.dev, *corpus.train]), (
        "all, if few"
    )
    lost = report["KL(full || decoded), the rest as one, mean"]
    assert 0 < lost < 1e-2, "what the codec loses"
    assert report["KL(full || decoded), the rest as one, mean (another pass)"] == lost, "this teacher repeats itself"


def test_what_another_pass_differs_by_is_not_counted_as_lost(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = recorded.RecordedEngine.full

    def otherwise(self: object, samples: list[Sample]) -> Iterator[object]:
        """The same tokens, and distributions that are drawn from other ids."""
        others = [
            dataclasses.replace(sample, sample_id=f"{int(sample.sample_id, 16) + 999:016x}") for sample in samples
        ]
        yield from told(self, others)

    monkeypatch.setattr(recorded.RecordedEngine, "full", otherwise)
    recorded.fill(tmp_path, teacher)
    report = ShardSet(tmp_path).fidelity()
    lost = report["KL(full || decoded), the rest as one, mean"]
    assert lost < 1e-2 < report["KL(full || decoded), the rest as one, mean (another pass)"]


def test_a_set_whose_engine_tells_no_distributions_is_sealed_without_a_measure(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded.RecordedEngine, "full", lambda self, samples: iter(()))
    manifest = recorded.fill(tmp_path, teacher)
    assert "fidelity.json" not in manifest.teacher_files
    assert ShardSet(tmp_path).fidelity() == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("worker: CUDA out of memory")])
def test_memory_that_does_not_suffice_to_measure_costs_a_finished_set_only_the_measure(
    tmp_path: Path, recorded: ModuleType, teacher: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(self: object, samples: list[Sample]) -> Iterator[object]:
        raise error
        yield

    monkeypatch.setattr(recorded.RecordedEngine, "full", full)
    events: list[Event] = []
    manifest = recorded.fill(tmp_path, teacher, emit=events.append)
    assert "fidelity.json" not in manifest.teacher_files
    said = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert said == [f"the replica died while fidelity was measured: {error}"]


def test_on_nfs_a_set_is_sealed(tmp_path: Path, recorded: ModuleType, teacher: Path, nfs_locks: None) -> None:
    assert recorded.fill(tmp_path, teacher) == read_manifest(tmp_path)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in teacher.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text('{"other": 1}')
    corpus = recorded.make_corpus(teacher)
    with pytest.raises(StageError, match="another tokenizer"):
        cache_module.fill_cache(
            corpus=corpus,
            teacher=cache_module.TeacherSettings(model="recorded"),
            cache=recorded.CACHE,
            teacher_folder=other,
            target=tmp_path / "shards",
            emit=lambda _: None,
            engine=lambda folder, settings, spec: recorded.RecordedEngine(spec),
        )


def test_progress_counts_response_tokens_up_to_all(tmp_path: Path, recorded: ModuleType, teacher: Path) -> None:
    events: list[Event] = []
    manifest = recorded.fill(tmp_path, teacher, emit=events.append)
    progress = [event for event in events if isinstance(event, Progress)]
    corpus = recorded.make_corpus(teacher)
    tokens = sum(len(sample.response_ids) for sample in [*corpus.train, *corpus.dev])
    assert {(event.unit, event.total) for event in progress} == {("response tokens", tokens)}
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert (progress[-1].done, progress[-1].bytes) == (tokens, manifest.totals()["bytes"])
