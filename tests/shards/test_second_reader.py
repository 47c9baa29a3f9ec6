"""A second reader, written from FORMAT.md alone, against the golden files. It imports nothing from `shards`.

R6: the golden sets were written once by each codec version and must decode bit-equal for ever; they are never made
again. `expected.npz` holds what the version's reader gave on that day.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(path.name for path in GOLDEN.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """Section 1."""
    content = path.read_bytes()
    document = json.loads(content)
    assert canonical(document) == content
    seal = document.pop("seal")
    assert hashlib.sha256(canonical(document)).hexdigest() == seal
    return dict(document)


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode("ascii") + b"\n"


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).hexdigest().encode()


class Shard:
    """Sections 3 and 4."""

    def __init__(self, data: bytes) -> None:
        file = pa.ipc.open_file(pa.py_buffer(data))
        self.contract = json.loads(file.schema.metadata[b"contract"])
        assert self.contract["format_version"] in (1, 2)
        assert self.contract["codec"] == "topk-planes/1"
        assert file.schema.metadata[b"bytes"] == b"%020d" % len(data)
        assert file.num_record_batches == 1
        self.batch = file.get_batch(0)
        index, seal = file.metadata[b"index"], file.metadata[b"seal"]
        assert sha256(data.replace(seal, b"s" * 64)) == seal

        start = 8
        for _ in ("schema", "record batch"):
            start += 8 + struct.unpack_from("<i", data, start + 4)[0]
        footer_size = struct.unpack_from("<i", data, len(data) - 10)[0]
        end = len(data) - 10 - footer_size - 8
        after = data[end:].replace(index, b"i" * 64).replace(seal, b"s" * 64)
        assert sha256(data[:start], after, *self.fixed()) == index

    def fixed(self) -> Iterator[bytes]:
        rows = self.batch.num_rows
        for field, column in zip(self.batch.schema, self.batch.columns, strict=True):
            buffers = [None if buffer is None else buffer.to_pybytes() for buffer in column.buffers()]
            if field.name.endswith("_ids") or field.name in ("signal", "attention", "sample_id"):
                yield buffers[1][: 4 * (rows + 1)]
                if field.name == "sample_id":
                    yield buffers[2][: sum(len(name.as_py().encode()) for name in column)]
            else:
                yield buffers[1][: rows * field.type.bit_width // 8]

    def cell(self, name: str, row: int) -> bytes:
        names = [
            name for name in ("prompt_ids", "response_ids", "signal", "attention") if name in self.batch.schema.names
        ]
        value = self.batch.column(name)[row].as_py()
        cell = value if isinstance(value, bytes) else np.array(value, "<i4").tobytes()
        check = hashlib.blake2b(name.encode() + b"\0" + struct.pack("<I", row) + cell, digest_size=8).digest()
        at = 8 * names.index(name)
        assert self.batch.column("checks")[row].as_py()[at : at + 8] == check
        return cell


def streams(cell: bytes, sizes: list[int]) -> list[np.ndarray]:
    """Section 5, first paragraph."""
    compressed = struct.unpack_from(f"<{len(sizes)}I", cell)
    start, found = 4 * len(sizes), []
    for size, frame_size in zip(sizes, compressed, strict=True):
        frame = cell[start : start + frame_size]
        assert zstandard.frame_content_size(frame) == size
        found.append(np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8).astype(np.int64))
        start += frame_size
    assert start == len(cell)
    return found


def planes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def number(parts: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for index, part in enumerate(parts):
        total = total + part * 256**index
    return total


def decode_signal(cell: bytes, contract: dict[str, Any], positions: int) -> dict[str, np.ndarray]:
    """Section 5, entry by entry."""
    k = contract["k"] if contract["format_version"] == 1 else contract["selection"]["k"]
    width = planes(contract["vocab_size"] - 1)
    parts = streams(cell, [positions * k] * (width + 1) + [4 * positions])
    gaps, levels = number(parts[:width]).reshape(positions, k), parts[width].reshape(positions, k)
    tail_codes, entropy_codes = number(list(parts[-1].reshape(2, 2, positions).swapaxes(0, 1)))
    roots = np.array([1 - j / 240 if j <= 237 else (3 / 240) * 0.55 ** (j - 237) for j in range(256)])
    ids, logprobs, log_tails = [], [], []
    for position in range(positions):
        rising, previous = [], -1
        for gap in gaps[position].tolist():
            previous = previous + 1 + gap
            rising.append(previous)
        assert rising[-1] < contract["vocab_size"]
        order = sorted(range(k), key=lambda entry: (levels[position, entry], rising[entry]))
        code = int(tail_codes[position])
        x = (code - 32768) / 128
        log_tail, log_head = (-np.logaddexp(0, -x), -np.logaddexp(0, x)) if code else (-np.inf, 0.0)
        chosen = roots[[int(levels[position, entry]) for entry in order]]
        ids.append([rising[entry] for entry in order])
        logprobs.append(2 * np.log(chosen) + log_head - np.log((chosen**2).sum()))
        log_tails.append(log_tail)
    return {
        "ids_NK": np.array(ids, np.int32),
        "logprobs_NK": np.array(logprobs).astype(np.float32),
        "log_tail_N": np.array(log_tails).astype(np.float32),
        "entropy_N": (entropy_codes / 1024).astype(np.float32),
    }


def decode_attention(cell: bytes, contract: dict[str, Any], positions: int, prompt: int) -> dict[str, np.ndarray]:
    """Section 6, row by row."""
    layers, top_m = len(contract["attention"]["layers"]), contract["attention"]["top_m"]
    kept, width, rows = min(top_m, prompt - 1), planes(prompt - 1), layers * positions
    parts = streams(cell, [rows * kept] * (width + 1) + [6 * rows])
    gaps, codes = number(parts[:width]).reshape(rows, kept), parts[width].reshape(rows, kept)
    sink, mass, entropy = (number(list(pair)) for pair in parts[-1].reshape(3, 2, rows))
    keys, weights = np.full((rows, top_m), -1, np.int32), np.zeros((rows, top_m), np.float32)
    for row in range(rows):
        rising = (np.cumsum(gaps[row] + 1)).tolist()
        assert not rising or rising[-1] < prompt
        order = sorted(range(kept), key=lambda entry: (-codes[row, entry], rising[entry]))
        shares = (codes[row, order] / 63) ** 2
        divisor = (shares.sum() or 1.0) if kept == prompt - 1 else max(1.0, shares.sum())
        keys[row, :kept] = [rising[entry] for entry in order]
        weights[row, :kept] = shares / divisor * (mass[row] / 65535)
    shape = (layers, positions)
    return {
        "positions_LNM": keys.reshape(*shape, top_m),
        "weights_LNM": weights.reshape(*shape, top_m),
        "sink_LN": (sink / 65535).astype(np.float32).reshape(shape),
        "prompt_LN": (mass / 65535).astype(np.float32).reshape(shape),
        "entropy_LN": (entropy / 1024).astype(np.float32).reshape(shape),
    }


def second_reading(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a set, by "shard/row/field"."""
    manifest = read_json(folder / "manifest.json")
    assert read_json(folder / "contract.json")["contract"] == manifest["contract"]
    for name, digest in manifest["teacher_files"].items():
        assert hashlib.sha256((folder / "teacher" / name).read_bytes()).hexdigest() == digest
    found = {}
    for info in manifest["shards"]:
        data = (folder / info["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info["sha256"]
        shard = Shard(data)
        assert shard.contract == manifest["contract"]
        for row, number_of_positions in enumerate(shard.batch.column("positions").to_pylist()):
            prompt = np.frombuffer(shard.cell("prompt_ids", row), np.int32)
            arrays = {
                "prompt_ids_P": prompt,
                "response_ids_R": np.frombuffer(shard.cell("response_ids", row), np.int32),
                **decode_signal(shard.cell("signal", row), shard.contract, number_of_positions),
            }
            if shard.contract["attention"] is not None:
                cell = shard.cell("attention", row)
                arrays |= decode_attention(cell, shard.contract, number_of_positions, len(prompt))
            found |= {f"{info['name']}/{row}/{name}": array for name, array in arrays.items()}
    return found


def first_reading(folder: Path) -> dict[str, np.ndarray]:
    """The same through the reader under test."""
    from shards.reader import ShardSet
    from shards.verify import verify_shards

    shards, found = ShardSet(folder), {}
    assert verify_shards(shards.storage).intact
    for info in shards.manifest.shards:
        shard = shards.open(info)
        for row in range(len(shard)):
            record = shard[row]
            for part in (record, record.attention):
                for name in getattr(part, "__slots__", ()):
                    if isinstance(value := getattr(part, name), np.ndarray):
                        found[f"{info.name}/{row}/{name}"] = value
    return found


def expected(name: str) -> dict[str, np.ndarray]:
    """Arrays by the names that fields have today; two were called otherwise on the day."""
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        return {key.replace("/topk_", "/"): array for key, array in arrays.items()}


def require_bit_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


@pytest.mark.parametrize("name", SETS)
def test_R6_golden_sets_decode_bit_equal(name: str) -> None:
    require_bit_equal(first_reading(GOLDEN / name), expected(name))


@pytest.mark.parametrize("name", SETS)
def test_a_second_reader_made_from_the_specification_agrees(name: str) -> None:
    require_bit_equal(second_reading(GOLDEN / name), expected(name))


def test_every_codec_version_has_a_golden_set() -> None:
    from shards.codec import CODECS

    written = {read_json(GOLDEN / name / "contract.json")["contract"]["codec"] for name in SETS}
    assert written == set(CODECS)
