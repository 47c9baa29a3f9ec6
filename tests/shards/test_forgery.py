"""R3 to R5: forged shards, whose every checksum agrees: no bytes, however made, do more than raise a ShardError."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from shards import framing
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import ContractMismatch, Corrupt, ShardError, UnknownVersion
from shards.planes.rans import Stream
from shards.planes.tables import plain_tables
from shards.record import Record
from shards.schema import cell_names
from shards.shard import ShardReader
from shards.storage import LocalStorage
from shards.units import describe
from shards.writer import build_shard
from tests.shards.forging import Change, compressed, forge, in_row, replace_attention, replace_frame, reseal
from tests.shards.whole import contract_of, learnt, record_of

Same = Callable[[Record, Record], None]


def read_all(path: Path) -> list[Record]:
    with ShardReader.open(path) as shard:
        return [shard[row] for row in range(len(shard))]


def require_refused(path: Path, error: type[ShardError], match: str | None = None) -> None:
    with pytest.raises(error, match=match):
        read_all(path)


def test_a_forgery_that_changes_nothing_reads_as_before(shard: Path, same: Same) -> None:
    before = read_all(shard)
    data = shard.read_bytes()
    forge(shard, lambda columns: None)
    assert shard.read_bytes() == data
    for left, right in zip(before, read_all(shard), strict=True):
        same(left, right)


def contract_json(contract: Contract, **changes: object) -> dict[bytes, bytes]:
    return {b"contract": json.dumps({**json.loads(contract.to_json()), **changes}).encode()}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"format_version": 3}, UnknownVersion, "format version 3"),
        ({"format_version": None}, UnknownVersion, "format version None"),
        ({"codec": "topk-planes/9"}, UnknownVersion, "topk-planes/9"),
        ({"selection": {"kind": "topk", "k": 5}}, Corrupt, "not k = 5 each"),
        ({"selection": {"kind": "topk", "k": 3}}, Corrupt, "contradict"),
        ({"selection": {"kind": "topk", "k": 0}}, Corrupt, "k must be"),
        ({"selection": {"kind": "topk", "k": "4"}}, Corrupt, "k must be"),
        ({"selection": {"kind": "topk", "k": 10**30}}, Corrupt, "k must be"),
        ({"selection": {"kind": "best", "k": 4}}, Corrupt, "selection must be"),
        ({"selection": {"kind": "hybrid", "k": 4}}, Corrupt, "draws must be"),
        ({"selection": {"kind": "topk", "k": 4, "mass": 0.5}}, Corrupt, "belong to an adaptive"),
        ({"selection": {"kind": "topk", "k": 4, "tail_known": -1}}, Corrupt, "tail_known must be true or false"),
        ({"selection": {"kind": "topk", "k": 4, "tail_known": "yes"}}, Corrupt, "tail_known must be true or false"),
        ({"selection": {"kind": "topk", "k": 4, "logprobs": 1}}, Corrupt, "logprobs must be true or false"),
        ({"selection": {"kind": "adaptive", "k": 4, "mass": True}}, Corrupt, "mass must be a number"),
        ({"selection": {"kind": "adaptive", "k": 4, "floor": False}}, Corrupt, "floor must be a number"),
        ({"selection": "topk"}, Corrupt, None),
        ({"curve": [0.25, 0.5]}, Corrupt, "curve must be"),
        ({"vocab_size": 1 << 25}, Corrupt, "vocab_size must be"),
        ({"vocab_size": 200}, Corrupt, None),
        ({"attention": 7}, Corrupt, None),
        ({"attention": {"layers": [1], "top_m": 1 << 20}}, Corrupt, "top_m must be"),
        ({"attention": None}, Corrupt, "columns are not those"),
        ({"surprise": 1}, Corrupt, "surprise"),
        ({"teacher": ["x"]}, Corrupt, "teacher must be text"),
    ],
)
def test_R3_a_foreign_or_senseless_contract_has_its_own_error(
    shard: Path, contract: Contract, change: dict[str, object], error: type[ShardError], match: str | None
) -> None:
    forge(shard, lambda columns: None, metadata=contract_json(contract, **change))
    require_refused(shard, error, match)


@pytest.mark.parametrize(
    "change", [{"tokenizer_fingerprint": "9"}, {"vocab_size": 301}, {"teacher_fingerprint": "9"}], ids=str
)
def test_R3_a_foreign_tokenizer_vocabulary_or_teacher_is_named(
    shard: Path, contract: Contract, change: dict[str, Any]
) -> None:
    ours = dataclasses.replace(contract, **change)
    with pytest.raises(ContractMismatch, match=next(iter(change))):
        describe(LocalStorage(shard.parent), shard.name, ours)


def within_memory(in_child: Callable[..., int], action: Callable[[], None], *, megabytes: int = 256) -> None:
    """Run an action in a child that may not grow by more than so much. Its failure is a signal."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os.abort()

    assert in_child(limited) == 0


HUGE = 1 << 31


def zeros(size: int) -> bytes:
    """A frame that states and holds `size` zero bytes, made without holding them."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    block = bytes(1 << 20)
    return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()


def stateless_zeros(size: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    block = bytes(1 << 20)
    return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()


@pytest.mark.parametrize("frame", [zeros, stateless_zeros])
def test_R4_a_frame_that_expands_without_end_is_not_expanded(
    shard: Path, in_child: Callable[..., int], frame: Callable[[int], bytes]
) -> None:
    bomb = frame(HUGE)
    assert len(bomb) < HUGE >> 10
    forge(shard, in_row("signal", 0, lambda cell: replace_frame(cell, 2, bomb)))
    within_memory(in_child, lambda: require_refused(shard, Corrupt, "does not state"))


def test_R4_a_frame_that_holds_more_than_it_states_is_not_expanded(shard: Path, in_child: Callable[..., int]) -> None:
    with ShardReader.open(shard) as reader:
        entries = reader[0].ids_NK.size
    liar = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    honest = zstandard.ZstdCompressor().compress(bytes(entries))
    # Header of the honest frame, blocks of the big one.
    lie = honest[:6] + bytes(liar[zstandard.frame_header_size(bytes(liar)) :])
    assert zstandard.frame_content_size(lie) == entries
    forge(shard, in_row("signal", 0, lambda cell: replace_frame(cell, 2, lie)))
    within_memory(in_child, lambda: require_refused(shard, Corrupt, "cannot be expanded"))


def test_R4_compressed_arrow_buffers_are_refused_before_they_are_expanded(
    shard: Path, in_child: Callable[..., int]
) -> None:
    file = pa.ipc.open_file(pa.py_buffer(shard.read_bytes()))
    batch = file.get_batch(0)
    index = batch.schema.get_field_index("signal")
    big = pa.array([bytes(1 << 26)] * 3, pa.binary())
    columns = [big if number == index else column for number, column in enumerate(batch.columns)]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    blanks = {b"index": framing.BLANK_INDEX, b"seal": framing.BLANK_SEAL}
    with pa.ipc.new_file(sink, file.schema, options=options, metadata=blanks) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=file.schema))
    shard.write_bytes(bytes(sink.getvalue()))
    assert shard.stat().st_size < 1 << 20
    within_memory(in_child, lambda: require_refused(shard, Corrupt, "compressed, which no shard"), megabytes=64)


def numbers(**values: int) -> Change:
    def change(columns: dict[str, Any]) -> None:
        for name, value in values.items():
            columns[name][0] = value

    return change


@pytest.mark.parametrize(
    "values",
    [
        {"positions": 1 << 28, "entries": 1 << 30},
        {"positions": 0, "entries": 0},
        {"positions": -1, "entries": -4},
        {"positions": 6, "entries": 24},
        {"entries": 21},
        {"first_position": 1},
        {"first_position": -1},
        {"prompt_length": 1 << 30},
        {"prompt_length": 0},
        {"response_length": 1 << 30},
    ],
    ids=str,
)
def test_R4_counts_beyond_what_the_file_holds_are_refused_at_open(
    shard: Path, in_child: Callable[..., int], values: dict[str, int]
) -> None:
    forge(shard, numbers(**values))
    within_memory(in_child, lambda: require_refused(shard, Corrupt, "contradict"))


@pytest.mark.parametrize(
    "attention",
    [
        {"layers": [0, 1, 2, 3], "top_m": 1_024, "rows": "all"},
        {"layers": list(range(1_024)), "top_m": 1, "rows": "response"},
    ],
    ids=["rows", "layers"],
)
def test_R4_attention_of_many_rows_or_layers_is_bounded_before_memory_is_taken(
    tmp_path: Path, in_child: Callable[..., int], attention: dict[str, Any]
) -> None:
    """One position after 20,000 tokens, whose cell orders no key."""
    contract = contract_of(Selection(kind="topk", k=2), attention=AttentionSpec(layers=(0,), top_m=1))
    record = record_of(contract, np.random.default_rng(0), positions=1, prompt=20_000)
    contract, tables = learnt(contract, [])
    path = tmp_path / "train-00000.arrow"
    path.write_bytes(build_shard("train-00000", "train", contract, [record], tables=tables))
    cell = plain_tables(contract.vocab_size, 16).coder.pack(
        [Stream("key-counts", np.zeros(len(attention["layers"]), np.int32))]
    )
    forge(path, in_row("attention", 0, cell), metadata=contract_json(contract, attention=attention))
    within_memory(in_child, lambda: require_refused(path, Corrupt, "contradict"))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("signal", b"", "within its header"),
        ("signal", lambda cell: cell[:-1], "do not fill it"),
        ("signal", lambda cell: cell + b"\0", "do not fill it"),
        ("signal", lambda cell: replace_frame(cell, 0, b"no frame"), "cannot be expanded"),
        ("signal", lambda cell: replace_frame(cell, 0, compressed([255] * 20, np.uint8)), "outside a vocabulary"),
        ("attention", lambda cell: replace_attention(cell, 0, 200), "key"),
        ("attention", lambda cell: replace_attention(cell, 1, 64), "share 64"),
        ("prompt_ids", [300] * 6, "outside the vocabulary"),
        ("prompt_ids", [-1] * 6, "outside the vocabulary"),
        ("response_ids", [300] * 5, "outside the vocabulary"),
    ],
)
def test_R5_a_payload_that_means_nothing_is_corrupt(shard: Path, name: str, value: Any, match: str) -> None:
    forge(shard, in_row(name, 0, value))
    require_refused(shard, Corrupt, f"record 0: .*{match}")


def fuzz_bytes(path: Path, data: bytes, rng: np.random.Generator, rounds: int) -> tuple[int, int]:
    """Damage, recompute index and seal, read. Returns how many inputs were resealed and how many were refused."""
    resealed = refused = 0
    for _ in range(rounds):
        damaged = bytearray(data)
        for offset in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[offset] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        try:
            reseal(damaged)
            resealed += 1
        except (ShardError, pa.ArrowException, OSError, ValueError, KeyError, IndexError):
            pass
        path.write_bytes(damaged)
        try:
            with ShardReader.open(path) as shard:
                shard.verify()
            read_all(path)
        except ShardError:
            refused += 1
    return resealed, refused


def test_R5_damaged_bytes_under_recomputed_checksums_raise_nothing_but_shard_errors(
    shard: Path,
) -> None:
    resealed, refused = fuzz_bytes(shard, shard.read_bytes(), np.random.default_rng(5), 2_000)
    assert resealed > 1_000
    assert refused > 1_000


@pytest.mark.long
def test_R5_long_fuzz(shard: Path) -> None:
    fuzz_bytes(shard, shard.read_bytes(), np.random.default_rng(55), 40_000)


def test_R5_damaged_payloads_under_recomputed_checks_raise_nothing_but_shard_errors(
    shard: Path, contract: Contract
) -> None:
    data, rng, refused = shard.read_bytes(), np.random.default_rng(6), 0
    for _ in range(800):
        shard.write_bytes(data)
        name = str(rng.choice(["signal", "attention"]))

        def damage(cell: bytes) -> bytes:
            damaged = bytearray(cell)
            for offset in rng.integers(0, len(cell), rng.integers(1, 5)):
                damaged[offset] ^= 1 << int(rng.integers(8))
            return bytes(damaged[: rng.integers(len(damaged))] if rng.random() < 0.1 else damaged)

        forge(shard, in_row(name, int(rng.integers(3)), damage))
        try:
            for record in read_all(shard):
                assert np.isfinite(record.logprobs_NK).all()
                assert record.ids_NK.max() < contract.vocab_size
        except ShardError:
            refused += 1
    assert refused > 400


def test_the_checked_cells_are_those_of_the_contract(contract: Contract) -> None:
    assert cell_names(contract) == ("prompt_ids", "response_ids", "signal", "attention")
    assert cell_names(dataclasses.replace(contract, attention=None)) == ("prompt_ids", "response_ids", "signal")
