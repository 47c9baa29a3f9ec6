"""The fidelity report against loops in float64, for records whose loss is known."""

from __future__ import annotations

import numpy as np
import pytest

from shards.contract import Contract, Selection
from shards.fidelity import Fidelity, tail_partition
from shards.record import Float64, Record

NODES = (0.5, 0.25)


def contract(selection: Selection, curve: tuple[float, ...] = ()) -> Contract:
    return Contract(
        codec="topk-planes/1",
        teacher="t",
        teacher_fingerprint="t",
        tokenizer_fingerprint="t",
        vocab_size=200,
        start_token_id=0,
        end_token_id=1,
        selection=selection,
        curve=curve,
        attention=None,
        corpus_fingerprint="c",
        engine="e",
        dtype="d",
    )


def full_distribution(rows: int = 6, scale: float = 3.0) -> Float64:
    logits = np.random.default_rng(4).normal(size=(rows, 200)) * scale
    logprobs: Float64 = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs


def record_of(logprobs_NV: Float64, k: int, curve: tuple[float, ...] = ()) -> Record:
    """What a lossless codec would keep."""
    ids = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :k]
    tail = logprobs_NV.copy()
    np.put_along_axis(tail, ids, -np.inf, axis=1)
    powers = {node: np.exp(node * tail) for node in curve}
    finite = np.where(np.isinf(tail), 0, tail)
    values = [power.sum(1) for power in powers.values()]
    slopes = [(power * finite).sum(1) / power.sum(1) for power in powers.values()]
    return Record(
        sample_id="s",
        prompt_ids_P=np.ones(1, np.int32),
        response_ids_R=np.ones(len(ids), np.int32),
        first_position=0,
        ids_NK=ids.astype(np.int32),
        logprobs_NK=np.take_along_axis(logprobs_NV, ids, 1).astype(np.float32),
        log_tail_N=np.logaddexp.reduce(tail, axis=1).astype(np.float32),
        entropy_N=(-(np.exp(logprobs_NV) * logprobs_NV).sum(1)).astype(np.float32),
        curve_NJ=np.stack([*map(np.log, values), *slopes], axis=1).astype(np.float32) if curve else None,
    )


def test_a_lossless_record_loses_only_the_shape_of_its_tail() -> None:
    full = full_distribution()
    fidelity = Fidelity(contract(Selection(kind="topk", k=20)))
    fidelity.add(record_of(full, 20), full)
    report = fidelity.report()
    assert report["positions"] == 6
    assert abs(report["KL(full || decoded), the rest as one, largest"]) < 1e-5
    assert report["error of the entropy, largest"] < 1e-5
    kept = np.sort(np.exp(full), axis=1)[:, -20:].sum(1)
    assert report["mass of the kept ids, mean"] == pytest.approx(kept.mean(), rel=1e-3)
    divergence = []
    for row in full:
        order = np.argsort(-row)
        decoded = row.copy()
        decoded[order[20:]] = np.log(np.exp(row[order[20:]]).mean())
        divergence.append((np.exp(row) * (row - decoded)).sum())
    assert report["KL(full || decoded), the rest spread evenly, mean"] == pytest.approx(np.mean(divergence), rel=1e-3)


def test_what_a_codec_loses_of_the_head_shows() -> None:
    full = full_distribution()
    honest = record_of(full, 20)
    worn = np.log(np.exp(honest.logprobs_NK) * np.linspace(0.9, 1.1, 20, dtype=np.float32))
    tail = np.log1p(-np.exp(worn).sum(1))
    decoded = Record(
        **{name: getattr(honest, name) for name in honest.__dataclass_fields__}
        | {"logprobs_NK": worn, "log_tail_N": tail}
    )
    fidelity = Fidelity(contract(Selection(kind="topk", k=20)))
    fidelity.add(decoded, full)
    expected = []
    for row in range(6):
        p = np.exp(full[row][honest.ids_NK[row]])
        rest = 1 - p.sum()
        expected.append((p * np.log(p / np.exp(worn[row]))).sum() + rest * np.log(rest / np.exp(tail[row])))
    assert fidelity.report()["KL(full || decoded), the rest as one, mean"] == pytest.approx(np.mean(expected), rel=1e-2)


def test_positions_with_fewer_ids_count_only_what_they_have() -> None:
    full = full_distribution()
    honest = record_of(full, 5)
    padded = {
        "ids_NK": np.pad(honest.ids_NK, ((0, 0), (0, 3)), constant_values=-1),
        "logprobs_NK": np.pad(honest.logprobs_NK, ((0, 0), (0, 3)), constant_values=-np.inf),
    }
    decoded = Record(**{name: getattr(honest, name) for name in honest.__dataclass_fields__} | padded)
    reports = []
    for kept, record in ((Selection(kind="topk", k=5), honest), (Selection(kind="adaptive", k=8, mass=0.9), decoded)):
        fidelity = Fidelity(contract(kept))
        fidelity.add(record, full)
        reports.append(fidelity.report())
    assert reports[0] == reports[1]


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_the_share_of_the_KL_is_that_of_students_that_err_a_little_everywhere(temperature: float) -> None:
    full, rng = full_distribution(), np.random.default_rng(0)
    record = record_of(full, 20)
    fidelity = Fidelity(contract(Selection(kind="topk", k=20)))
    fidelity.add(record, full)
    tempered = full / temperature - np.logaddexp.reduce(full / temperature, axis=1, keepdims=True)
    whole = seen = 0.0
    for _ in range(400):
        student = tempered + 0.01 * rng.normal(size=full.shape)
        student -= np.logaddexp.reduce(student, axis=1, keepdims=True)
        for row in range(6):
            p, q, kept = np.exp(tempered[row]), np.exp(student[row]), record.ids_NK[row]
            whole += (p * np.log(p / q)).sum()
            rest_p, rest_q = np.delete(p, kept).sum(), np.delete(q, kept).sum()
            seen += (p[kept] * np.log(p[kept] / q[kept])).sum() + rest_p * np.log(rest_p / rest_q)
    assert fidelity.report()[f"share of the KL kept at T = {temperature:g}"] == pytest.approx(seen / whole, rel=2e-2)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_the_curve_gives_the_partition_of_any_temperature(temperature: float) -> None:
    full = full_distribution(rows=40, scale=2.0)
    record = record_of(full, 12, NODES)
    tail = full.copy()
    np.put_along_axis(tail, record.ids_NK.astype(np.int64), -np.inf, axis=1)
    truth = np.logaddexp.reduce(tail / temperature, axis=1)
    ours = tail_partition(record, NODES, 1 / temperature, 200)
    assert np.abs(ours - truth).max() < (1e-4 if 1 / temperature in (1.0, *NODES) else 2e-2)


def test_tempered_errors_are_of_the_whole_partition() -> None:
    full = full_distribution(rows=40, scale=2.0)
    fidelity = Fidelity(contract(Selection(kind="topk", k=12), NODES))
    fidelity.add(record_of(full, 12, NODES), full)
    report = fidelity.report()
    assert report["error of log Z at T = 2, largest"] < 1e-4, "a node"
    assert 0 < report["error of log Z at T = 1.5, largest"] < 2e-2, "between two"


def test_a_rounded_entropy_does_not_bend_the_curve_of_a_thin_tail() -> None:
    """Half a step of the entropy's code over a tail of 1e-6 would be a slope in the thousands."""
    full = full_distribution(rows=40, scale=9.0)
    honest = record_of(full, 60, NODES)
    assert honest.log_tail_N.min() < np.log(1e-6)
    fields = {name: getattr(honest, name) for name in honest.__dataclass_fields__}
    for shift in (-1 / 512, 1 / 512):
        fidelity = Fidelity(contract(Selection(kind="topk", k=60), NODES))
        fidelity.add(Record(**fields | {"entropy_N": honest.entropy_N + np.float32(shift)}), full)
        assert fidelity.report()["error of log Z at T = 1.5, largest"] < 2e-2
