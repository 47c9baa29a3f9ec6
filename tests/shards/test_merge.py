"""Sets of one teacher become one set, byte for byte the one that a single pass would have made, but for the corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.contract import Contract, Selection
from shards.errors import ContractMismatch, Corrupt, InvalidRequest
from shards.inspect import inspect
from shards.learnt import with_tables
from shards.manifest import Manifest, begin, publish_teacher_files, seal
from shards.merge import leaked_prompts, merge_sets, merged_corpus
from shards.reader import ShardSet
from shards.record import Record
from shards.storage import LocalStorage
from shards.verify import verify_shards
from shards.writer import build_shard, write_shard
from tests.shards.whole import SELECTIONS, contract_of, record_of

TEACHER = {"tokenizer.json": b"{}"}


def make(folder: Path, contract: Contract, shards: dict[str, list[Record]], **files: bytes) -> Manifest:
    begin(folder, contract)
    infos = [write_shard(folder, unit, unit.split("-")[0], contract, rows) for unit, rows in shards.items()]
    return seal(folder, contract, infos, teacher_folder=publish_teacher_files(folder, {**TEACHER, **files}))


@pytest.fixture
def sources(tmp_path: Path, contract: Contract, written: list[Record]) -> list[Path]:
    old, new = tmp_path / "old", tmp_path / "new"
    make(old, contract, {"train-00000": written[:2], "train-00001": written[2:3], "dev-00000": written[3:4]})
    newer = dataclasses.replace(contract, corpus_fingerprint="9" * 64)
    make(new, newer, {"train-00000": written[4:6], "dev-00000": written[6:]}, **{"fidelity.json": b"{}"})
    return [old, new]


def test_a_merged_set_is_the_set_of_one_pass(
    tmp_path: Path, sources: list[Path], contract: Contract, written: list[Record]
) -> None:
    told: list[tuple[int, int]] = []
    merged = merge_sets(sources, tmp_path / "merged", progress=lambda *counts: told.append(counts))
    one_corpus = dataclasses.replace(contract, corpus_fingerprint=merged_corpus(["3" * 64, "9" * 64]))
    shards = {
        "dev-00000": written[3:4],
        "dev-00001": written[6:],
        "train-00000": written[:2],
        "train-00001": written[2:3],
        "train-00002": written[4:6],
    }
    assert merged == make(tmp_path / "one pass", one_corpus, shards)
    for unit, rows in shards.items():
        there = (tmp_path / "merged" / f"{unit}.arrow").read_bytes()
        assert there == build_shard(unit, unit.split("-")[0], one_corpus, rows)
    assert verify_shards(tmp_path / "merged").intact
    assert told[-1] == (7, 7)


def test_a_merge_that_was_stopped_goes_on(tmp_path: Path, sources: list[Path]) -> None:
    def stop(done: int, total: int) -> None:
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_sets(sources, tmp_path / "merged", progress=stop)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").glob("*.arrow")}
    assert len(before) == 2
    merged = merge_sets(sources, tmp_path / "merged")
    assert merged == merge_sets(sources, tmp_path / "undisturbed")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").glob("*.arrow")}
    assert before.items() <= after.items()
    assert merge_sets(sources, tmp_path / "merged") == merged


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: f"{selection.kind} {selection.draws}")
def test_sets_of_other_tables_are_coded_once_more(tmp_path: Path, selection: Selection) -> None:
    """Ids and counts stay exact; of a probability, the codec's error is made twice."""
    folders = [tmp_path / name for name in ("old", "new")]
    for number, folder in enumerate(folders):
        contract, rng = contract_of(selection, corpus_fingerprint=f"{number}"), np.random.default_rng(number)
        records = [record_of(contract, rng, positions=30, name=f"{number}-{row}") for row in range(3)]
        contract, tables = with_tables(LocalStorage(folder), contract, lambda given=records: given, budget=2000)
        begin(folder, contract)
        seal(folder, contract, [write_shard(folder, "train-00000", "train", contract, records, tables=tables)])
    assert len({ShardSet(folder).contract.tables for folder in folders}) == 2
    merged = merge_sets(folders, tmp_path / "merged")
    assert merged.contract.tables == ShardSet(folders[0]).contract.tables
    assert verify_shards(tmp_path / "merged").intact
    before = [record for folder in folders for record in ShardSet(folder).split("train")]
    for found, truth in zip(ShardSet(tmp_path / "merged").split("train"), before, strict=True):
        assert found.sample_id == truth.sample_id
        kept_NK = truth.ids_NK >= 0
        for n, kept_K in enumerate(kept_NK):
            assert sorted(found.ids_NK[n][found.ids_NK[n] >= 0]) == sorted(truth.ids_NK[n][kept_K])
        if truth.draws_NK is not None and found.draws_NK is not None:
            assert found.draws_NK.sum() == truth.draws_NK.sum()
        if truth.logprobs_NK is not None and found.logprobs_NK is not None:
            np.testing.assert_allclose(found.coverage_N, truth.coverage_N, atol=0.02)


def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, sources: list[Path], contract: Contract, written: list[Record]
) -> None:
    foreign = dataclasses.replace(contract, teacher_fingerprint="8" * 64, corpus_fingerprint="7" * 64)
    make(tmp_path / "foreign", foreign, {"train-00000": written[:1]})
    with pytest.raises(ContractMismatch, match="teacher_fingerprint"):
        merge_sets([sources[0], tmp_path / "foreign"], tmp_path / "merged")
    other = dataclasses.replace(contract, corpus_fingerprint="6" * 64)
    make(tmp_path / "other head", other, {"train-00000": written[6:]}, **{"head_pca.safetensors": b"other"})
    with pytest.raises(ContractMismatch, match=r"head_pca\.safetensors of the teacher is not the same"):
        merge_sets([sources[0], tmp_path / "other head"], tmp_path / "merged")
    with pytest.raises(InvalidRequest, match=r"sample 'sample-3' is in .*old and again in .*old"):
        merge_sets([sources[0], sources[0]], tmp_path / "merged")
    with pytest.raises(InvalidRequest, match="at least two"):
        merge_sets(sources[:1], tmp_path / "merged")
    with pytest.raises(ContractMismatch, match="corpus_fingerprint"):
        merge_sets(sources, sources[0])
    assert not (tmp_path / "merged").exists()


def test_a_damaged_source_is_not_carried_on(tmp_path: Path, sources: list[Path], written: list[Record]) -> None:
    path = sources[1] / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(written[5].prompt_ids_P.tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="record 1"):
        merge_sets(sources, tmp_path / "merged")


def test_merged_records_are_the_sources_own(
    tmp_path: Path, sources: list[Path], same: Callable[[Record, Record], None]
) -> None:
    merge_sets(sources, tmp_path / "merged")
    merged = ShardSet(tmp_path / "merged")
    for split in ("train", "dev"):
        found = [record for source in sources for record in ShardSet(source).split(split)]
        for left, right in zip(merged.split(split), found, strict=True):
            same(left, right)
    assert inspect(tmp_path / "merged").checksum.intact


def test_prompts_that_validate_in_one_set_and_are_trained_on_in_another_are_counted(
    tmp_path: Path, contract: Contract, written: list[Record]
) -> None:
    """Another's answers to them, as they are here, do not hide them; within one set splits are as they were made."""
    contract = dataclasses.replace(contract, attention=None)
    old, new = tmp_path / "old", tmp_path / "new"

    def answered(name: str, prompt_ids_P: np.ndarray) -> Record:
        return dataclasses.replace(written[0], sample_id=name, prompt_ids_P=prompt_ids_P, attention=None)

    none, own, shared, other = (np.array(ids, np.int32) for ids in ([1], [2, 3], [4, 5], [6, 7]))
    make(
        old,
        contract,
        {"train-0": [answered(f"{ids}", ids) for ids in (none, own, shared)], "dev-0": [answered("a", own)]},
    )
    make(
        new,
        contract,
        {"dev-0": [answered(f"new {ids}", ids) for ids in (none, shared, other)], "train-0": [answered("b", other)]},
    )
    assert leaked_prompts([old, new]) == leaked_prompts([new, old]) == 1
