"""Sections 1 to 4 of FORMAT.md, read without `shards`."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


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


def require_selection(contract: dict[str, Any]) -> None:
    """Section 2."""
    selection, curve = contract["selection"], contract["curve"]
    kind, k, draws = selection["kind"], selection["k"], selection["draws"]
    assert kind in ("topk", "adaptive", "hybrid", "sample")
    assert k == 0 if kind == "sample" else 1 <= k <= min(4096, contract["vocab_size"])
    assert 1 <= draws <= 4096 if kind in ("hybrid", "sample") else draws == 0
    if kind == "adaptive":
        assert 0 < selection["mass"] <= 1
        assert 0 <= selection["floor"] < 1
    else:
        assert (selection["mass"], selection["floor"]) == (1, 0)
    assert selection["logprobs"] or kind == "sample"
    assert selection["tail_known"] or (kind in ("topk", "adaptive") and not curve)
    assert len(curve) <= 8
    assert all(0 < exponent < 1 for exponent in curve)
    assert curve == sorted(set(curve), reverse=True)


class Shard:
    """Sections 3 and 4."""

    def __init__(self, data: bytes) -> None:
        file = pa.ipc.open_file(pa.py_buffer(data))
        self.contract = json.loads(file.schema.metadata[b"contract"])
        assert self.contract["format_version"] in (1, 2)
        assert self.contract["codec"] in ("topk-planes/1", "planes/3")
        if self.contract["format_version"] == 2:
            require_selection(self.contract)
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
            if field.name.endswith("_ids") or field.name in ("signal", "attention", "tables", "sample_id"):
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
