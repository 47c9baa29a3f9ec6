"""A second reader, written from FORMAT.md alone, against the golden files. It imports nothing from `shards`.

R6: the golden sets were written once by each released codec version and must decode bit-equal for ever; they are never
made again. `expected.npz` holds what the version's reader gave on that day.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shards.second_reader_planes import Planes
from tests.shards.second_reader_shard import Shard, read_json, require_selection
from tests.shards.second_reader_topk import decode_attention, decode_signal

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(path.name for path in GOLDEN.iterdir())


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
        reader = payload_readers(shard)
        lengths = zip(*(shard.batch.column(name).to_pylist() for name in ("first_position", "positions")), strict=True)
        for row, (first, positions) in enumerate(lengths):
            prompt, response = (
                np.frombuffer(shard.cell(name, row), np.int32) for name in ("prompt_ids", "response_ids")
            )
            arrays = {
                "prompt_ids_P": prompt,
                "response_ids_R": response,
                **reader[0](shard.cell("signal", row), response[first : first + positions].tolist()),
            }
            if shard.contract["attention"] is not None:
                arrays |= reader[1](shard.cell("attention", row), positions, len(prompt))
            found |= {f"{info['name']}/{row}/{name}": array for name, array in arrays.items()}
    return found


def payload_readers(shard: Shard) -> tuple[Any, Any]:
    """What decodes a signal and an attention cell, by the codec's name."""
    contract = shard.contract
    if contract["codec"] == "planes/3":
        tables, *others = shard.batch.column("tables").to_pylist()
        assert not any(others)
        codec = Planes(contract, tables)
        return codec.signal, codec.attention
    return (
        lambda cell, labels: decode_signal(cell, contract, len(labels)),
        lambda cell, positions, prompt: decode_attention(cell, contract, positions, prompt),
    )


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


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"kind": "topk", "k": 4096}, True),
        ({"kind": "topk", "k": 5, "tail_known": False}, True),
        ({"kind": "adaptive", "k": 9, "mass": 0.9, "floor": 0.01}, True),
        ({"kind": "hybrid", "k": 9, "draws": 4096}, True),
        ({"kind": "sample", "draws": 1, "logprobs": False}, True),
        ({"kind": "topk", "k": 5, "curve": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]}, True),
        ({"kind": "topk", "k": 4097}, False),
        ({"kind": "topk"}, False),
        ({"kind": "topk", "k": 5, "draws": 1}, False),
        ({"kind": "topk", "k": 5, "mass": 0.9}, False),
        ({"kind": "topk", "k": 5, "logprobs": False}, False),
        ({"kind": "topk", "k": 5, "tail_known": False, "curve": [0.5]}, False),
        ({"kind": "topk", "k": 5, "curve": [0.25, 0.5]}, False),
        ({"kind": "topk", "k": 5, "curve": [1.0]}, False),
        ({"kind": "topk", "k": 5, "curve": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]}, False),
        ({"kind": "adaptive", "k": 9, "mass": 0.0}, False),
        ({"kind": "adaptive", "k": 9, "floor": 1.0}, False),
        ({"kind": "hybrid", "k": 9}, False),
        ({"kind": "hybrid", "k": 9, "draws": 5, "tail_known": False}, False),
        ({"kind": "sample", "draws": 4097}, False),
        ({"kind": "sample", "k": 3, "draws": 9}, False),
    ],
)
def test_both_readers_know_the_same_selections(changes: dict[str, Any], holds: bool) -> None:
    from shards.contract import Contract
    from shards.errors import Corrupt

    contract = read_json(GOLDEN / "planes-3-topk" / "contract.json")["contract"] | {"vocab_size": 10_000}
    contract["curve"] = changes.get("curve", [])
    selection = {"k": 0, "draws": 0, "mass": 1.0, "floor": 0.0, "logprobs": True, "tail_known": True}
    contract["selection"] = selection | {name: value for name, value in changes.items() if name != "curve"}
    with contextlib.nullcontext() if holds else pytest.raises(AssertionError):
        require_selection(contract)
    with contextlib.nullcontext() if holds else pytest.raises(Corrupt):
        Contract.from_json(json.dumps(contract))
