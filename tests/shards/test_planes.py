"""Codec "planes/3": R7 for every selection, against a naive oracle."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.codec import codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.planes.levels import LEAST_STEPS, MOST_STEPS, Levels, level_roots
from shards.planes.tables import Tables
from shards.record import Record
from shards.validation import require_valid
from tests.shards.bucket_kl import bucket_kl
from tests.shards.whole import SELECTIONS, contract_of, learnt, record_of

Learnt = tuple[Contract, bytes, list[Record]]


def tables_of(data: bytes, contract: Contract) -> Tables:
    return Tables.from_bytes(data, contract.vocab_size)


@st.composite
def learnt_records(draw: st.DrawFn) -> Learnt:
    """A contract with tables from none or some of its records, or from others."""
    selection = draw(st.sampled_from(SELECTIONS))
    attention = draw(
        st.sampled_from(
            [
                None,
                AttentionSpec(layers=(0, 3), top_m=3),
                AttentionSpec(layers=(1,), top_m=9, rows="all"),
            ]
        )
    )
    nodes = draw(st.sampled_from([(), (0.5,), (0.7, 0.5, 0.25)])) if selection.tail_known else ()
    vocab_size = draw(st.sampled_from([max(1, selection.k), 12, 40, 300, 70_000]))
    contract = contract_of(selection, vocab_size=vocab_size, attention=attention, curve=nodes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    records = [
        record_of(contract, rng, positions=draw(st.integers(1, 7)), prompt=draw(st.sampled_from([1, 2, 3, 30])))
        for _ in range(2)
    ]
    contract, tables = learnt(contract, records[: draw(st.integers(0, 1))])
    return contract, tables, records


@settings(max_examples=60, deadline=None)
@given(learnt_records())
def test_R7_every_selection_comes_back_as_the_naive_oracle_says(given_: Learnt) -> None:
    contract, tables, records = given_
    codec = codec_for(contract, tables)
    for record, cell in zip(records, codec.encode_signals(records), strict=True):
        require_valid(record, contract)
        kept = int((record.ids_NK >= 0).sum())
        decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=kept)
        require_valid(as_record(record, decoded), contract)
        for position in range(record.positions):
            require_position(record, decoded, position, contract, tables_of(tables, contract))


def as_record(record: Record, decoded: Any) -> Record:
    fields = {field.name: getattr(decoded, field.name) for field in dataclasses.fields(decoded)}
    return dataclasses.replace(record, **fields)


def require_position(record: Record, decoded: Any, position: int, contract: Contract, tables: Tables) -> None:
    selection, roots = contract.selection, level_roots(tables.steps)
    truth, found = kept_ids(record, position), kept_ids(decoded, position)
    head, drawn = slice(0, selection.k), slice(selection.k, None)
    if selection.kind != "sample":
        values = [np.sqrt(np.exp(np.float64(record.logprobs_NK[position, place]))) for place in range(len(truth[head]))]
        levels = [nearest(roots, value) for value in values]
        order = sorted(range(len(levels)), key=lambda place: (-levels[place], truth[place]))
        assert found[head] == [truth[place] for place in order]
        shares = np.array([roots[levels[place]] ** 2 for place in order])
        shares /= shares.sum()
        log_head = decoded_log_head(decoded, position)
        expected = np.log(shares) + log_head
        np.testing.assert_allclose(decoded.logprobs_NK[position, : len(expected)], expected, rtol=2e-6, atol=2e-6)
        mass = np.exp(record.logprobs_NK[position, head].astype(np.float64)).sum()
        if selection.tail_known and record.log_tail_N[position] > -np.inf:
            error = odds(decoded.log_tail_N[position], log_head) - odds(record.log_tail_N[position], np.log(mass))
            assert abs(error) <= 1 / 128 + 1e-4
    if selection.kind == "sample":
        assert decoded.log_tail_N[position] == 0
    assert sorted(found[drawn]) == sorted(truth[drawn])
    if selection.draws:
        require_draws(record, decoded, position, selection)
    if selection.tail_known:
        assert abs(decoded.entropy_N[position] - record.entropy_N[position]) <= 1 / 512 + 1e-5
        assert np.isneginf(decoded.log_tail_N[position]) == np.isneginf(record.log_tail_N[position])
    else:
        assert np.isnan(decoded.entropy_N[position])
        assert np.isnan(decoded.log_tail_N[position])
    require_curve(record, decoded, position, len(contract.curve))


def nearest(roots: np.ndarray, value: float) -> int:
    return int(np.abs(roots - value).argmin())


def kept_ids(signal: Any, position: int) -> list[int]:
    return [id_ for id_ in signal.ids_NK[position].tolist() if id_ >= 0]


def decoded_log_head(decoded: Any, position: int) -> float:
    """What the decoded tail leaves; where it is not given, what the decoded head says itself."""
    log_tail = float(decoded.log_tail_N[position])
    if np.isnan(log_tail):
        return float(np.logaddexp.reduce(decoded.logprobs_NK[position].astype(np.float64)))
    return (
        float(np.log1p(-np.exp(np.float64(log_tail))))
        if log_tail < -1e-3
        else float(np.logaddexp.reduce(decoded.logprobs_NK[position].astype(np.float64)))
    )


def odds(log_tail: float, log_head: float) -> float:
    return float(log_tail) - float(log_head)


def require_draws(record: Record, decoded: Any, position: int, selection: Selection) -> None:
    """Counts are exact, log-probabilities within 1/32 nat, the order is the stated one."""
    assert record.draws_NK is not None
    count = int((record.ids_NK[position] >= 0).sum())
    truth = dict(zip(record.ids_NK[position].tolist(), record.draws_NK[position].tolist(), strict=True))
    found = decoded.draws_NK[position, :count].tolist()
    assert found == [truth[id_] for id_ in kept_ids(decoded, position)]
    ids, k = kept_ids(decoded, position)[selection.k :], min(selection.k, count)
    if record.logprobs_NK is None:
        assert ids == sorted(ids, key=lambda id_: (-truth[id_], id_))
        return
    logs = dict(zip(record.ids_NK[position].tolist(), record.logprobs_NK[position].tolist(), strict=True))
    values = decoded.logprobs_NK[position, k:count].tolist()
    assert all(abs(value - logs[id_]) <= 1 / 32 + 1e-5 for id_, value in zip(ids, values, strict=True))
    assert list(zip(ids, values, strict=True)) == sorted(
        zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])
    )


def require_curve(record: Record, decoded: Any, position: int, nodes: int) -> None:
    if not nodes:
        assert decoded.curve_NJ is None
        return
    assert record.curve_NJ is not None
    truth, found = record.curve_NJ[position], decoded.curve_NJ[position]
    if np.isneginf(record.log_tail_N[position]):
        assert np.isneginf(found[:nodes]).all()
        assert (found[nodes:] == 0).all()
        return
    np.testing.assert_allclose(found[:nodes], truth[:nodes], atol=1 / 2048 + 2e-5, rtol=0)
    np.testing.assert_allclose(found[nodes:], truth[nodes:], atol=1 / 512 + 2e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(learnt_records())
def test_R7_attention_of_every_row_comes_back_within_its_bounds(given_: Learnt) -> None:
    contract, tables, records = given_
    if contract.attention is None:
        return
    codec = codec_for(contract, tables)
    for record in records:
        truth = record.attention
        assert truth is not None
        prompt_length = len(record.prompt_ids_P)
        found = codec.decode_attention(
            codec.encode_attention(record), positions=record.positions, prompt_length=prompt_length
        )
        require_valid(dataclasses.replace(record, attention=found), contract)
        assert np.abs(found.sink_LN - truth.sink_LN).max() <= 1 / 256 + 1e-6
        assert np.abs(found.prompt_LN - truth.prompt_LN).max() <= 1 / 256 + 1e-6
        assert np.abs(found.entropy_LN - truth.entropy_LN).max() <= 1 / 16 + 1e-5
        rows = truth.sink_LN.shape[1]
        for layer, row in np.ndindex(*truth.sink_LN.shape):
            sight = prompt_length - 1 if rows == record.positions else min(row + 1, prompt_length - 1)
            expected = naive_weights(truth, layer, row, sight, float(found.prompt_LN[layer, row]))
            keys, weights = found.positions_LNM[layer, row].tolist(), found.weights_LNM[layer, row].tolist()
            assert dict(zip(keys, weights, strict=True)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def naive_weights(truth: Any, layer: int, row: int, sight: int, prompt: float) -> dict[int, float]:
    """The decoded weight of each key, by the definition."""
    mass, shares = float(truth.prompt_LN[layer, row]), {}
    keys, weights = truth.positions_LNM[layer, row].tolist(), truth.weights_LNM[layer, row].tolist()
    for key, weight in zip(keys, weights, strict=True):
        root = np.sqrt(min(1.0, weight / mass)) if mass > 0 else 0.0
        shares[key] = (round(16 * root) / 16) ** 2
    total = sum(shares.values())
    divisor = (total or 1.0) if sight <= len(keys) else max(1.0, total)
    return {key: share / divisor * prompt for key, share in shares.items()}


@pytest.mark.parametrize("steps", [LEAST_STEPS, 194, 254, MOST_STEPS])
def test_R7_the_worst_level_keeps_the_stated_bound(steps: int) -> None:
    """KL over a head is at most the sum of (p - q)^2 / q over its entries, whatever the scale: check every border."""
    roots = level_roots(steps)
    assert len(roots) == Levels(steps).count <= 254
    assert (np.diff(roots) > 0).all()
    assert 1 <= roots[-1] <= 1 + 1 / steps
    borders = (roots[1:] + roots[:-1]) / 2
    worst = max(float(((borders**2 - ends**2) ** 2 / ends**2).max()) for ends in (roots[1:], roots[:-1]))
    assert worst <= 4.4 / steps**2


def test_R7_a_head_of_any_size_costs_about_the_same_kl() -> None:
    for k in (8, 24, 64):
        contract = contract_of(Selection(kind="topk", k=k), vocab_size=5_000)
        rng = np.random.default_rng(k)
        records = [record_of(contract, rng, positions=40) for _ in range(5)]
        contract, tables = learnt(contract, records)
        codec = codec_for(contract, tables)
        cells = codec.encode_signals(records)
        decoded = [
            codec.decode_signal(cell, labels_N=record.labels_N, entries=40 * k)
            for record, cell in zip(records, cells, strict=True)
        ]
        kl = np.concatenate([bucket_kl(record, signal) for record, signal in zip(records, decoded, strict=True)])
        assert kl.mean() <= 1.8e-4
        assert kl.max() <= 4.4 * k / tables_of(tables, contract).steps ** 2 + 3e-5


def test_the_compiler_is_not_loaded_before_a_loop_runs() -> None:
    program = "import sys, shards.reader, shards.planes.codec; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_threads_may_share_a_codec() -> None:
    contract = contract_of(Selection(kind="topk", k=6))
    rng = np.random.default_rng(1)
    records = [record_of(contract, rng, positions=60) for _ in range(20)]
    contract, tables = learnt(contract, records)
    codec = codec_for(contract, tables)
    cells = codec.encode_signals(records)

    def ids_of(record: Record, cell: bytes) -> np.ndarray:
        return codec.decode_signal(cell, labels_N=record.labels_N, entries=360).ids_NK

    expected = [ids_of(record, cell) for record, cell in zip(records, cells, strict=True)]
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for record, cell, ids_NK in list(zip(records, cells, expected, strict=True)) * 5:
                np.testing.assert_array_equal(ids_of(record, cell), ids_NK)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
