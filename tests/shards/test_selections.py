"""Shards of every selection: W7 refuses what is none, R1, R4 and R5 hold for payloads and tables, and they are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from shards.codec import codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import Corrupt, InvalidRecord, ShardError
from shards.planes.learn_tables import learn_tables
from shards.planes.rans import STATES, Coder, Stream, learn_frequencies
from shards.planes.tables import fingerprint, plain_tables
from shards.record import Record
from shards.shard import ShardReader
from shards.validation import require_valid
from shards.writer import build_shard
from tests.shards.whole import SELECTIONS, contract_of, record_of

NAMES = ("topk", "unknown", "adaptive", "hybrid", "sample", "counts")
Set = tuple[Contract, bytes, list[Record]]


@pytest.fixture(scope="module")
def sets() -> dict[str, Set]:
    """By name: a contract, its tables, three records."""
    found = {}
    for name, selection in zip(NAMES, SELECTIONS, strict=True):
        curve = (0.5, 0.25) if selection.tail_known else ()
        attention = AttentionSpec(layers=(0, 3), top_m=3, rows="all")
        contract = contract_of(selection, curve=curve, attention=attention)
        rng = np.random.default_rng(len(found))
        records = [record_of(contract, rng, positions=n, prompt=p, name=f"{n}") for n, p in ((8, 6), (1, 1), (20, 9))]
        tables = learn_tables(records, contract)
        found[name] = dataclasses.replace(contract, tables=fingerprint(tables)), tables, records
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_of_any_selection_reads_as_its_codec_decodes(sets: dict[str, Set], name: str, tmp_path: Path) -> None:
    contract, tables, records = sets[name]
    path = tmp_path / "a.arrow"
    path.write_bytes(build_shard("a", "train", contract, records, tables=tables))
    codec = codec_for(contract, tables)
    with ShardReader.open(path) as shard:
        shard.verify()
        assert shard.tables == tables
        for row, record in enumerate(records):
            read = shard[row]
            kept = int((record.ids_NK >= 0).sum())
            expected = codec.decode_signal(codec.encode_signals([record])[0], labels_N=record.labels_N, entries=kept)
            for field in dataclasses.fields(expected):
                np.testing.assert_array_equal(getattr(read, field.name), getattr(expected, field.name))
            assert int(shard.numbers("entries")[row]) == kept


@pytest.mark.parametrize("name", NAMES)
def test_R1_one_flipped_bit_of_the_tables_is_found_at_open(sets: dict[str, Set], name: str, tmp_path: Path) -> None:
    contract, tables, records = sets[name]
    data = build_shard("a", "train", contract, records, tables=tables)
    start = data.index(tables)
    for offset in np.random.default_rng(0).integers(0, len(tables), 10).tolist():
        damaged = bytearray(data)
        damaged[start + offset] ^= 1
        path = tmp_path / "a.arrow"
        path.write_bytes(damaged)
        with pytest.raises(Corrupt, match="tables are not those"):
            ShardReader.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_R5_damaged_cells_of_any_selection_raise_nothing_but_shard_errors(sets: dict[str, Set], name: str) -> None:
    contract, tables, records = sets[name]
    codec, rng, refused = codec_for(contract, tables), np.random.default_rng(7), 0
    record = records[2]
    cells = {"signal": codec.encode_signals([record])[0], "attention": codec.encode_attention(record)}
    for trial in range(600):
        kind = ("signal", "attention")[trial % 2]
        damaged = bytearray(cells[kind])
        for offset in rng.integers(0, len(damaged), rng.integers(1, 5)):
            damaged[offset] = rng.choice([0, 0x7F, 0xFF, damaged[offset] ^ 1, rng.integers(256)])
        cell = bytes(damaged[: rng.integers(len(damaged))] if rng.random() < 0.1 else damaged)
        try:
            if kind == "signal":
                kept = int((record.ids_NK >= 0).sum())
                decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=kept)
                assert decoded.ids_NK.max() < contract.vocab_size
                assert decoded.logprobs_NK is None or not np.isnan(decoded.logprobs_NK).any()
            else:
                codec.decode_attention(cell, positions=record.positions, prompt_length=len(record.prompt_ids_P))
        except ShardError:
            refused += 1
    assert refused > 100


def streams_of(contract: Contract, *streams: tuple[str, list[int]]) -> bytes:
    """A cell of plain streams; the contract has tables without codes."""
    coder = plain_tables(contract.vocab_size, 16).coder
    return coder.pack(Stream(kind, np.array(numbers)) for kind, numbers in streams)


def test_R4_sizes_are_bounded_before_memory_is_taken(in_child: Callable[..., int]) -> None:
    """5,000 positions of one id and one that claims 4,096: 16 million entries' room for 8,095."""
    import resource

    contract = contract_of(Selection(kind="adaptive", k=4_096), vocab_size=70_000)
    tables = learn_tables([], contract)
    codec = codec_for(dataclasses.replace(contract, tables=fingerprint(tables)), tables)
    cell = streams_of(
        contract,
        ("classes", [0] * 5_000),
        ("sizes", [0] * 4_999 + [4_095]),
        ("least", [0] * 5_000),
        ("labels", [0] * 5_000),
    )

    def action() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        try:
            with pytest.raises(Corrupt, match="keeps more ids than a record may"):
                codec.decode_signal(cell, labels_N=np.zeros(5_000, np.int32), entries=9_095)
        except BaseException:
            os.abort()

    assert in_child(action) == 0


HEAD = (
    ("classes", [0]),
    ("least", [30]),
    ("labels", [1]),
    ("ids", [7]),
    ("levels", [0]),
    ("tail", [0]),
    ("entropy", [0]),
)
DRAWS = (("classes", [0]), ("sizes", [2]), ("drawn-labels", [1]), ("drawn", [7]), ("counts", [0]), ("entropy", [0]))


@pytest.mark.parametrize(
    ("selection", "streams", "changed", "match"),
    [
        (Selection(kind="topk", k=2), HEAD, {"ids": [4]}, "holds the label"),
        (Selection(kind="topk", k=2), HEAD, {"labels": [200]}, "a level that does not exist"),
        (Selection(kind="topk", k=2), HEAD, {"levels": [200]}, "a level that does not exist"),
        (Selection(kind="topk", k=2), HEAD, {"ids": [50]}, "a rank outside"),
        (Selection(kind="topk", k=2), HEAD, {"classes": [1]}, "a class that does not exist"),
        (Selection(kind="sample", draws=3, logprobs=False), DRAWS, {"drawn": [4]}, "holds the label"),
        (Selection(kind="sample", draws=3, logprobs=False), DRAWS, {"drawn-labels": [2]}, "a label more than once"),
        (Selection(kind="sample", draws=3, logprobs=False), DRAWS, {"counts": [2]}, "more than 3 draws"),
    ],
)
def test_R5_numbers_that_contradict_each_other_are_refused(
    selection: Selection, streams: tuple[tuple[str, list[int]], ...], changed: dict[str, list[int]], match: str
) -> None:
    """Position 0 has the label 4 and one other id."""
    contract = contract_of(selection, vocab_size=50)
    tables = learn_tables([], contract)
    codec = codec_for(dataclasses.replace(contract, tables=fingerprint(tables)), tables)
    contexts = {"ids": 6, "drawn": 6, "levels": 4}

    def decode(numbers: dict[str, list[int]]) -> Any:
        named = [Stream(kind, np.array(numbers[kind]), contexts.get(kind, 0)) for kind, _ in streams]
        cell = plain_tables(50, 16).coder.pack(named)
        return codec.decode_signal(cell, labels_N=np.array([4], np.int32), entries=2)

    assert sorted(decode(dict(streams)).ids_NK[0].tolist()) == [4, 7]
    with pytest.raises(Corrupt, match=match):
        decode(dict(streams) | changed)


def test_R4_a_cell_that_costs_nothing_gives_as_many_numbers_as_belong_there() -> None:
    """A symbol that is all but certain takes almost no bits, and there are always more of it."""
    code = learn_frequencies(np.bincount([0] * 100_000, minlength=256))
    reader = Coder({"a": code[None]}).reader(b"\xff" * 4 * STATES)
    assert len(reader.take("a", 100_000)) == 100_000
    with pytest.raises(Corrupt, match="do not fill it"):
        reader.end()


REFUSED: dict[str, tuple[str, str, Any, Any, str]] = {
    "no log-probabilities": ("topk", "logprobs_NK", None, None, "there or missing"),
    "draws of a top-k": ("topk", "draws_NK", None, "zeros", "draws are there or missing"),
    "no draws": ("hybrid", "draws_NK", None, None, "draws are there or missing"),
    "a gap between ids": ("adaptive", "ids_NK", (0, 0), -1, "fewer than 1 ids"),
    "too many draws": ("sample", "draws_NK", (0, 0), 99, "does not sum to 12"),
    "a draw of the head": ("hybrid", "draws_NK", (0, 0), 1, "was not drawn"),
    "no count": ("counts", "draws_NK", (0, 0), 0, "less than once"),
    "a known tail that is unknown": ("topk", "log_tail_N", 0, np.nan, "not a number"),
    "an unknown tail that is known": ("unknown", "log_tail_N", 0, -1.0, "the tail is not known"),
    "an unknown entropy that is known": ("unknown", "entropy_N", 0, 1.0, "the tail is not known"),
    "a head above 1": ("unknown", "logprobs_NK", (0, 0), 0.3, "sum to 1."),
    "a tail of a sample": ("sample", "log_tail_N", 0, -1.0, "not 1"),
    "draws above the tail": ("hybrid", "logprobs_NK", (0, 3), 0.5, "weigh more"),
    "rising draws": ("hybrid", "logprobs_NK", (0, 3), -70.0, "does not fall"),
    "a value for an absent id": ("adaptive", "logprobs_NK", "absent", -3.0, "-inf where the id is absent"),
    "no curve": ("topk", "curve_NJ", None, None, "curve is there or missing"),
    "a curve that falls": ("topk", "curve_NJ", (0, 1), -50.0, "no log-partition"),
    "a curve above every partition": ("topk", "curve_NJ", (0, 1), 9.0, "no log-partition"),
    "a slope that rises": ("topk", "curve_NJ", (0, 2), 1.0, "no log-partition"),
    "an endless slope": ("topk", "curve_NJ", (0, 3), -np.inf, "no log-partition"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_W7_what_is_no_selection_is_refused_at_encode(sets: dict[str, Set], fault: str) -> None:
    name, field, index, value, message = REFUSED[fault]
    contract, tables, records = sets[name]
    record = next(r for r in records if r.positions == (20 if index == "absent" else 8))
    if index is None:
        changed = None if value is None else np.zeros(record.ids_NK.shape, np.int32)
    else:
        changed = getattr(record, field).copy()
        if index == "absent":
            index = tuple(np.argwhere(record.ids_NK == -1)[0])
        changed[index] = value
    with pytest.raises(InvalidRecord) as error:
        build_shard("u", "train", contract, [dataclasses.replace(record, **{field: changed})], tables=tables)
    assert message in str(error.value)


def test_W7_an_attention_key_after_its_row_is_refused(sets: dict[str, Set]) -> None:
    contract, tables, records = sets["topk"]
    attention = records[0].attention
    assert attention is not None
    positions_LNM = attention.positions_LNM.copy()
    assert positions_LNM[0, 0].tolist() == [1, -1, -1]
    positions_LNM[0, 0, 0] = 2
    changed = dataclasses.replace(records[0], attention=dataclasses.replace(attention, positions_LNM=positions_LNM))
    with pytest.raises(InvalidRecord, match="after its row"):
        build_shard("u", "train", contract, [changed], tables=tables)


def test_W7_a_prompt_too_long_for_so_many_layers_is_refused() -> None:
    spec = AttentionSpec(layers=tuple(range(1_024)), top_m=1)
    contract = contract_of(Selection(kind="topk", k=2), attention=spec)
    short = record_of(contract, np.random.default_rng(0), positions=1, prompt=2)
    for length in (1 << 14, (1 << 14) + 1):
        record = dataclasses.replace(short, prompt_ids_P=np.zeros(length, np.int32))
        if length == 1 << 14:
            require_valid(record, contract)
        else:
            with pytest.raises(InvalidRecord, match="16778240 prompt tokens over all layers"):
                require_valid(record, contract)


def test_a_curve_belongs_to_a_known_tail() -> None:
    with pytest.raises(ValueError, match="tail that is known"):
        contract_of(SELECTIONS[1], curve=(0.5,))


def test_tables_of_another_size_of_vocabulary_are_corrupt(sets: dict[str, Set]) -> None:
    contract, _, _ = sets["topk"]
    content = bytes([254, 1, 1, 1, 250]) + bytes(1 + 512 * 96)
    data = zstandard.ZstdCompressor().compress(content)
    with pytest.raises(Corrupt, match="outside a vocabulary of 200"):
        codec_for(dataclasses.replace(contract, vocab_size=200, tables=fingerprint(data)), data)
