"""Tables: classes of positions, what is learnt from records, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import zstandard

from shards.codec import codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import Corrupt, UnknownVersion
from shards.planes.codec import Planes3
from shards.planes.id_sets import choose_classes
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import Tables, fingerprint
from shards.record import Record
from tests.shards.whole import SELECTIONS, contract_of, learnt, record_of


def tables_of(data: bytes, contract: Contract) -> Tables:
    return Tables.from_bytes(data, contract.vocab_size)


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
            decoded = codec.decode_signal(
                cell, labels_N=records[0].labels_N, entries=int((records[0].ids_NK >= 0).sum())
            )
            assert decoded.ids_NK.max() < contract.vocab_size
        except Corrupt:
            refused += 1
    assert refused > 100
