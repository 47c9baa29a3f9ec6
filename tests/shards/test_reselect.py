"""Fewer ids out of a set are those that the teacher would have kept, tail and curve included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.contract import Contract, Selection
from shards.errors import ContractMismatch, InvalidRequest, UnknownVersion
from shards.learnt import with_tables
from shards.manifest import begin, publish_teacher_files, seal
from shards.reader import ShardSet
from shards.record import Float64, Record
from shards.reselect import require_held, reselect_set, reselected
from shards.storage import LocalStorage
from shards.verify import verify_shards
from shards.writer import write_shard
from tests.shards.whole import contract_of, record_of

CURVE = (0.75, 0.5, 0.25)
VOCABULARY = 300
SELECTIONS = [
    Selection(kind="topk", k=12),
    Selection(kind="topk", k=5),
    Selection(kind="topk", k=1),
    Selection(kind="adaptive", k=12, mass=0.8),
    Selection(kind="adaptive", k=6, mass=0.95, floor=0.02),
]


def distribution(seed: int) -> Float64:
    """Log-probabilities [N, V] of sharp and flat positions."""
    rng = np.random.default_rng(seed)
    logits_NV = rng.standard_normal((30, VOCABULARY)) * rng.choice([0.3, 2.0, 6.0], (30, 1))
    logprobs_NV: Float64 = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    return logprobs_NV


def selected(logprobs_NV: Float64, selection: Selection, drawn: int = 0) -> Record:
    """The naive oracle, position by position in double precision; `drawn` ids outside the head stand behind it."""
    positions, width = len(logprobs_NV), selection.k + drawn
    ids_NK = np.full((positions, width), -1, np.int32)
    logprobs_NK = np.full((positions, width), -np.inf, np.float32)
    draws_NK = np.zeros((positions, width), np.int32)
    log_tail_N, curve_NJ = np.empty(positions), np.empty((positions, 2 * len(CURVE)))
    for n, logprobs_V in enumerate(logprobs_NV):
        order, count, mass = np.argsort(-logprobs_V, kind="stable"), 0, 0.0
        while count < selection.k and (count == 0 or mass < selection.mass):
            probability = float(np.exp(logprobs_V[order[count]]))
            if count and probability < selection.floor:
                break
            mass, count = mass + probability, count + 1
        ids_NK[n, :count], logprobs_NK[n, :count] = order[:count], logprobs_V[order[:count]]
        if drawn:
            more = slice(count, count + drawn)
            ids_NK[n, more], logprobs_NK[n, more], draws_NK[n, more] = order[more], logprobs_V[order[more]], 1
        tail_V = logprobs_V[order[count:]]
        log_tail_N[n] = np.logaddexp.reduce(tail_V)
        for j, b in enumerate(CURVE):
            powers = np.exp(b * tail_V)
            curve_NJ[n, j], curve_NJ[n, len(CURVE) + j] = np.log(powers.sum()), (powers * tail_V).sum() / powers.sum()
    return Record(
        sample_id="sample",
        prompt_ids_P=np.arange(3, dtype=np.int32),
        response_ids_R=np.arange(positions, dtype=np.int32),
        first_position=0,
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        draws_NK=draws_NK if drawn else None,
        log_tail_N=log_tail_N.astype(np.float32),
        entropy_N=-(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1).astype(np.float32),
        curve_NJ=curve_NJ.astype(np.float32),
    )


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("drawn", [0, 4])
def test_what_is_dropped_goes_back_to_the_tail(selection: Selection, drawn: int) -> None:
    logprobs_NV = distribution(3)
    wide = selected(logprobs_NV, Selection(kind="topk", k=12), drawn)
    found, truth = reselected(wide, selection, CURVE), selected(logprobs_NV, selection)
    np.testing.assert_array_equal(found.ids_NK, truth.ids_NK, strict=True)
    np.testing.assert_array_equal(found.logprobs_NK, truth.logprobs_NK, strict=True)
    assert found.draws_NK is None
    np.testing.assert_allclose(found.log_tail_N, truth.log_tail_N, rtol=2e-6, atol=2e-7)
    assert found.curve_NJ is not None
    np.testing.assert_allclose(found.curve_NJ, truth.curve_NJ, rtol=2e-6, atol=2e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.entropy_N, truth.entropy_N, strict=True)


def test_nothing_outside_and_an_unknown_tail_stay_what_they_are() -> None:
    wide = selected(distribution(4), Selection(kind="topk", k=6))
    none = dataclasses.replace(
        wide,
        log_tail_N=np.full(30, -np.inf, np.float32),
        curve_NJ=np.tile(np.array([-np.inf, -np.inf, -np.inf, 0, 0, 0], np.float32), (30, 1)),
    )
    found = reselected(none, Selection(kind="topk", k=6), CURVE)
    assert np.isneginf(found.log_tail_N).all()
    assert found.curve_NJ is not None
    assert np.isneginf(found.curve_NJ[:, :3]).all()
    assert not np.isnan(found.curve_NJ).any()
    fewer = reselected(none, Selection(kind="topk", k=5), CURVE)
    np.testing.assert_allclose(fewer.log_tail_N, wide.logprobs_NK[:, 5], rtol=1e-6)  # type: ignore[index]
    assert fewer.curve_NJ is not None
    np.testing.assert_allclose(fewer.curve_NJ[:, 3:], np.tile(fewer.log_tail_N[:, None], 3), rtol=1e-5)

    unknown = dataclasses.replace(wide, log_tail_N=np.full(30, np.nan, np.float32))
    assert np.isnan(reselected(unknown, Selection(kind="topk", k=5), CURVE).log_tail_N).all()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (Selection(kind="sample", draws=50), Selection(kind="topk", k=5), "no exact ids"),
        (Selection(kind="topk", k=5), Selection(kind="topk", k=6), "keeps 5 ids a position, not 6"),
        (Selection(kind="topk", k=5), Selection(kind="hybrid", k=3, draws=4), "needs the teacher"),
        (Selection(kind="adaptive", k=9, mass=0.9), Selection(kind="topk", k=5), "can only become"),
        (
            Selection(kind="adaptive", k=9, mass=0.9),
            Selection(kind="adaptive", k=9, mass=0.95),
            "can only become",
        ),
    ],
)
def test_what_the_set_does_not_hold_is_refused(old: Selection, new: Selection, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        require_held(old, new)


def test_a_set_becomes_the_set_that_fewer_ids_would_have_made(
    tmp_path: Path, contract: Contract, make_record: Callable[..., Record], same: Callable[[Record, Record], None]
) -> None:
    wide = dataclasses.replace(contract, selection=Selection(kind="topk", k=8))
    rows = {f"train-0000{unit}": [make_record(wide, 10 * unit + row) for row in range(2)] for unit in range(2)}
    begin(tmp_path / "wide", wide)
    infos = [write_shard(tmp_path / "wide", unit, "train", wide, records) for unit, records in rows.items()]
    files = {"tokenizer.json": b"{}", "fidelity.json": b"{}"}
    seal(tmp_path / "wide", wide, infos, teacher_folder=publish_teacher_files(tmp_path / "wide", files))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    narrow, selection = tmp_path / "narrow", Selection(kind="topk", k=3)
    with pytest.raises(KeyboardInterrupt):
        reselect_set(tmp_path / "wide", narrow, selection, progress=stop)
    manifest = reselect_set(tmp_path / "wide", narrow, selection)
    assert manifest.contract == dataclasses.replace(wide, selection=selection)
    assert list(manifest.teacher_files) == ["tokenizer.json"], "the fidelity was another selection's"
    assert verify_shards(narrow).intact
    assert reselect_set(tmp_path / "wide", narrow, selection) == manifest
    truth = [make_record(contract, seed) for seed in (0, 1, 10, 11)]
    for found, given, before in zip(
        ShardSet(narrow).split("train"), truth, ShardSet(tmp_path / "wide").split("train"), strict=True
    ):
        np.testing.assert_array_equal(found.ids_NK[:, 0], before.ids_NK[:, 0])
        assert {tuple(sorted(ids)) for ids in found.ids_NK} <= {tuple(sorted(ids[:3])) for ids in before.ids_NK}
        np.testing.assert_allclose(found.coverage_N + np.exp(found.log_tail_N), 1, atol=1e-6)
        assert found.sample_id == given.sample_id
    with pytest.raises(ContractMismatch, match="selection"):
        reselect_set(tmp_path / "wide", narrow, Selection(kind="topk", k=2))
    with pytest.raises(UnknownVersion):
        reselect_set(tmp_path / "wide", tmp_path / "absent", Selection(kind="adaptive", k=3, mass=0.9))
    assert not (tmp_path / "absent").exists()


def test_an_imported_set_becomes_narrower_and_its_tail_stays_unknown(tmp_path: Path) -> None:
    imported = contract_of(Selection(kind="topk", k=5, tail_known=False))
    rows = [record_of(imported, np.random.default_rng(seed), name=str(seed)) for seed in range(2)]
    imported, tables = with_tables(LocalStorage(tmp_path / "wide"), imported, lambda: rows, budget=2000)
    begin(tmp_path / "wide", imported)
    seal(
        tmp_path / "wide", imported, [write_shard(tmp_path / "wide", "train-0", "train", imported, rows, tables=tables)]
    )
    made = reselect_set(tmp_path / "wide", tmp_path / "narrow", Selection(kind="topk", k=3))
    assert made.contract.selection == Selection(kind="topk", k=3, tail_known=False)
    assert all(np.isnan(record.log_tail_N).all() for record in ShardSet(tmp_path / "narrow").split("train"))
