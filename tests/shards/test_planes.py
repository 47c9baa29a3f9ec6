"""Codecs "planes/2" and "planes/3": R7 for every selection, against a naive oracle, and what it is built from."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.codec import codec_for
from shards.compiled import compiled
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import Corrupt, UnknownVersion
from shards.planes import numbers as numbers_module
from shards.planes.calibration import learn_tables
from shards.planes.codec import VERSIONS, Planes3
from shards.planes.huffman import MAX_LENGTH, PIECE, code_lengths, code_words
from shards.planes.id_sets import choose_classes
from shards.planes.levels import LEAST_STEPS, MOST_STEPS, Levels, level_roots
from shards.planes.prefix import PrefixCoder
from shards.planes.rans import LEAST_STATE, TOTAL, RansCoder
from shards.planes.streams import StreamCoder
from shards.planes.tables import Tables, fingerprint
from shards.record import Record
from shards.validation import require_valid
from tests.shards.bucket_kl import bucket_kl
from tests.shards.whole import SELECTIONS, contract_of, record_of

CODINGS = (PrefixCoder, RansCoder)
Learnt = tuple[Contract, bytes, list[Record]]


def learnt(contract: Contract, records: list[Record]) -> tuple[Contract, bytes]:
    tables = learn_tables(records, contract)
    return dataclasses.replace(contract, tables=fingerprint(tables)), tables


def tables_of(data: bytes, contract: Contract) -> Tables:
    return Tables.from_bytes(data, contract.vocab_size, VERSIONS[contract.codec].coding)


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
    codec = draw(st.sampled_from(sorted(VERSIONS)))
    contract = contract_of(selection, vocab_size=vocab_size, attention=attention, curve=nodes, codec=codec)
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
        decoded = codec.decode_signal(cell, positions=record.positions, entries=kept)
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
        levels = [int(np.abs(roots - value).argmin()) for value in values]
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
        decoded = [codec.decode_signal(cell, positions=40, entries=40 * k) for cell in cells]
        kl = np.concatenate([bucket_kl(record, signal) for record, signal in zip(records, decoded, strict=True)])
        assert kl.mean() <= 1.8e-4
        assert kl.max() <= 4.4 * k / tables_of(tables, contract).steps ** 2 + 3e-5


def test_positions_of_different_kinds_get_different_orders_and_fewer_bytes() -> None:
    """Two kinds of positions that keep disjoint ids: learnt classes tell them apart."""
    contract = contract_of(Selection(kind="topk", k=8), vocab_size=2_000)
    rng = np.random.default_rng(0)

    def record(name: str) -> Record:
        made = record_of(contract, rng, positions=100, name=name)
        ids_NK = np.stack([rng.choice(60, 8, replace=False) + 1_000 * rng.integers(2) for _ in range(100)])
        return dataclasses.replace(made, ids_NK=ids_NK.astype(np.int32))

    records = [record(str(number)) for number in range(40)]
    sizes = {}
    for name, taught in (("nothing", []), ("one class", records[:9]), ("two classes", records[:30])):
        learnt_contract, data = learnt(contract, taught)
        tables = tables_of(data, contract)
        sizes[name] = sum(map(len, codec_for(learnt_contract, data).encode_signals(records[30:])))
        if name == "two classes":
            classes = choose_classes(records[35].ids_NK, tables)
            low = records[35].ids_NK[:, 0] < 1_000
            assert not set(classes[low].tolist()) & set(classes[~low].tolist())
    assert sizes["two classes"] < 0.97 * sizes["one class"]
    assert sizes["one class"] < 0.8 * sizes["nothing"]


def test_the_class_is_the_cheapest_one() -> None:
    contract = contract_of(Selection(kind="topk", k=4), vocab_size=500)
    rng = np.random.default_rng(3)
    records = [record_of(contract, rng, positions=700) for _ in range(8)]
    tables = tables_of(learn_tables(records, contract), contract)
    assert len(tables.leading) > 3
    scale = 1_000 / np.log(1 << 24)
    naive = [
        min(
            range(len(tables.leading)),
            key=lambda c: (sum(round(scale * np.log1p(float(tables.ranks_CV[c, v]))) for v in ids), c),
        )
        for ids in records[0].ids_NK[:200].tolist()
    ]
    assert choose_classes(records[0].ids_NK[:200], tables).tolist() == naive


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=256))
def test_code_lengths_are_complete_and_no_longer_than_huffmans(counts: list[int]) -> None:
    array = np.zeros(256, np.int64)
    array[: len(counts)] = counts
    if np.count_nonzero(array) < 2:
        with pytest.raises(ValueError, match="two symbols"):
            code_lengths(array)
        return
    lengths = code_lengths(array)
    assert sum(2.0 ** -int(length) for length in lengths if length) == 1
    assert ((lengths > 0) == (array > 0)).all()
    bits, depth = huffman(array[array > 0].tolist())
    if depth <= MAX_LENGTH:
        assert int((lengths * array).sum()) == bits
    words = {
        format(int(word), f"0{length}b") for word, length in zip(code_words(lengths), lengths, strict=True) if length
    }
    assert not any(left != right and right.startswith(left) for left in words for right in words if len(words) < 40)


def huffman(counts: list[int]) -> tuple[int, int]:
    """Bits of all symbols and the longest word of a code by Huffman's own construction."""
    heap = [(count, index, 0) for index, count in enumerate(counts)]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        low, high = heapq.heappop(heap), heapq.heappop(heap)
        bits += low[0] + high[0]
        heapq.heappush(heap, (low[0] + high[0], low[1], 1 + max(low[2], high[2])))
    return bits, heap[0][2]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 2, 7, 100, 1_023, 1_024, 5_000, PIECE, PIECE + 1, 3 * PIECE - 5]),
    st.sampled_from([1, 3, 30, 191, 192, 5_000, numbers_module.WIDE_FROM + 5, numbers_module.LIMIT]),
)
def test_streams_of_any_length_and_range_come_back(seed: int, count: int, bound: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (bound * rng.random(count) ** 4).astype(np.int32)
    symbols = numbers_module.to_symbols(numbers)[0]
    near = np.bincount(symbols, minlength=256) + (np.arange(256) < 3)
    for coding, counts in itertools.product(CODINGS, (None, near, 1000 // (1 + np.arange(256)))):
        code = None if counts is None else coding.learn(counts)
        coder = coding({} if code is None else {"a": code})
        cell = coder.pack([("a", numbers), ("b", numbers[:3])])
        reader = coder.reader(cell)
        np.testing.assert_array_equal(reader.take("a", count), numbers)
        np.testing.assert_array_equal(reader.take("b", min(3, count)), numbers[:3])
        reader.end()


@pytest.mark.parametrize(("coding", "most"), [(PrefixCoder, 1.01), (RansCoder, 1.001)])
def test_a_learnt_code_comes_close_to_the_entropy(coding: type[StreamCoder], most: float) -> None:
    rng = np.random.default_rng(0)
    shares = np.exp(-np.arange(90) / 12)
    numbers = rng.choice(90, 20_000, p=shares / shares.sum())
    counts = np.bincount(numbers, minlength=256)
    code = coding.learn(counts)
    assert code is not None
    assert coding.is_code(code)
    used = counts[counts > 0] / counts.sum()
    entropy = float(-(used * np.log2(used)).sum()) * len(numbers) / 8
    cell = coding({"a": code}).pack([("a", numbers)])
    assert entropy < len(cell) < most * entropy + 20


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=256) | st.lists(st.just(7), max_size=256))
def test_frequencies_of_any_counts_are_a_code_that_no_single_step_betters(counts: list[int]) -> None:
    array = np.zeros(256, np.int64)
    array[: len(counts)] = counts
    code = RansCoder.learn(array).astype(np.int64)
    array[255] = max(1, array[255])
    assert code.sum() == TOTAL
    assert ((code > 0) == (array > 0)).all()

    def bits(frequencies: np.ndarray) -> float:
        return float(-(array[array > 0] * np.log2(frequencies[array > 0] / TOTAL)).sum())

    used = np.flatnonzero(array)
    for more, less in np.random.default_rng(0).choice(used, (12, 2)):
        other = code.copy()
        other[more] += 1
        other[less] -= 1
        assert other[less] == 0 or bits(other) >= bits(code) - 1e-6


def test_R5_the_compiled_decoder_stays_within_any_bytes() -> None:
    """Bytes of every kind before and after a cell: nothing beyond its ends is read, whatever states and words say."""
    rng = np.random.default_rng(0)
    numbers = (20_000_000 * rng.random(3_000) ** 12).astype(np.int32).clip(0, numbers_module.LIMIT - 1)
    code = RansCoder.learn(np.bincount(numbers_module.to_symbols(numbers)[0], minlength=256))
    coder = RansCoder({"a": code})
    cell = coder.pack([("a", numbers)])
    tried = refused = 0
    for size in [*range(40), *rng.integers(0, len(cell), 100).tolist(), len(cell) - 1, len(cell)]:
        for fill in (None, 0, 255):
            found = []
            for around in (0, 170):
                room = np.full(len(cell) + 4_000, around, np.uint8)
                room[2_000 : 2_000 + size] = np.frombuffer(cell, np.uint8)[:size] if fill is None else fill
                try:
                    reader = coder.reader(room[2_000 : 2_000 + size].data)
                    found.append(reader.take_all(("a", "b"), (3_000, 70_000)))
                except Corrupt:
                    found.append(None)
                    continue
                with pytest.raises(Corrupt, match="do not fill it"):
                    reader.end()
            tried, refused = tried + 1, refused + (found[0] is None)
            np.testing.assert_array_equal(*found)
    assert refused < tried / 2


def test_a_cell_of_other_states_or_left_over_bytes_is_corrupt() -> None:
    coder = RansCoder({})
    cell = coder.pack([("a", np.arange(0, 5_000, 7))])
    for damaged in (cell + b"\0", cell[:-1], cell[:16] + b"\0\0" + cell[16:], cell[:2] + b"\xff" + cell[3:]):
        reader = coder.reader(damaged)
        reader.take("a", 715)
        with pytest.raises(Corrupt, match="do not fill it"):
            reader.end()
    with pytest.raises(Corrupt, match="no writer leaves"):
        coder.reader((LEAST_STATE - 1).to_bytes(4, "little") + cell[4:])
    with pytest.raises(Corrupt, match="no room"):
        coder.reader(cell[:15])


def test_a_loop_that_cannot_be_kept_anywhere_is_compiled_all_the_same() -> None:
    """numba keeps nothing of a function without a file, as it does not where no folder can be written."""
    space: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", space)
    assert compiled(space["double"])(21) == 42


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
    expected = [codec.decode_signal(cell, positions=60, entries=360).ids_NK for cell in cells]
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for cell, ids_NK in list(zip(cells, expected, strict=True)) * 5:
                np.testing.assert_array_equal(codec.decode_signal(cell, positions=60, entries=360).ids_NK, ids_NK)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_same_records_teach_the_same_tables() -> None:
    contract = contract_of(Selection(kind="topk", k=6), attention=AttentionSpec(layers=(0,), top_m=3))
    records = [record_of(contract, np.random.default_rng(seed), positions=300) for seed in range(9)]
    assert learn_tables(records, contract) == learn_tables(records, contract)


def test_tables_keep_to_their_budget() -> None:
    contract = contract_of(Selection(kind="topk", k=60), vocab_size=10_000)
    rng = np.random.default_rng(0)
    records = [record_of(contract, rng, positions=100) for _ in range(6)]
    full, small = learn_tables(records, contract), learn_tables(records, contract, budget=1 << 11)
    for data, budget in ((full, 1 << 16), (small, 1 << 11)):
        tables = tables_of(data, contract)
        assert 2 * (len(tables.common) + sum(map(len, tables.leading))) <= budget
    assert len(small) < 0.75 * len(full)


def test_a_contract_without_its_tables_is_refused() -> None:
    contract, tables = learnt(contract_of(SELECTIONS[0]), [])
    with pytest.raises(Corrupt, match="not those that its contract names"):
        codec_for(contract, None)
    with pytest.raises(Corrupt, match="not those that its contract names"):
        codec_for(contract, tables + b"\0")
    with pytest.raises(UnknownVersion, match="needs tables"):
        Planes3(dataclasses.replace(contract, tables=None), None)


@pytest.mark.parametrize(
    ("position", "value", "match"),
    [(0, b"\x00", "0 steps"), (1, b"\x00", "0 classes"), (1, b"\x19", "25 classes"), (-1, b"\x0c", "that is none")],
)
def test_tables_that_mean_nothing_are_corrupt(position: int, value: bytes, match: str) -> None:
    import zstandard

    contract = contract_of(Selection(kind="topk", k=6, tail_known=False), vocab_size=50)
    data = learn_tables([], dataclasses.replace(contract, selection=Selection(kind="topk", k=6)))
    content = bytearray(zstandard.ZstdDecompressor().decompress(data))
    content[position : position + 1 or None] = value
    with pytest.raises(Corrupt, match=match):
        tables_of(zstandard.ZstdCompressor().compress(bytes(content)), contract)


def test_damaged_tables_raise_nothing_but_shard_errors() -> None:
    contract = contract_of(SELECTIONS[3], attention=AttentionSpec(layers=(0, 3), top_m=3))
    rng = np.random.default_rng(0)
    records = [record_of(contract, rng, positions=30) for _ in range(3)]
    import zstandard

    contract, tables = learnt(contract, records)
    (cell, *_), content = codec_for(contract, tables).encode_signals(records), None
    content = zstandard.ZstdDecompressor().decompress(tables)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for offset in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[offset] = rng.integers(256)
        data = zstandard.ZstdCompressor().compress(bytes(damaged))
        try:
            codec = codec_for(dataclasses.replace(contract, tables=fingerprint(data)), data)
            decoded = codec.decode_signal(cell, positions=30, entries=int((records[0].ids_NK >= 0).sum()))
            assert decoded.ids_NK.max() < contract.vocab_size
        except Corrupt:
            refused += 1
    assert refused > 100
