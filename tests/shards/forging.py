"""Shards with changed contents under checksums that agree with them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from shards import framing
from shards.schema import cell_check, fixed_parts

Change = Callable[[dict[str, Any]], None]
"""Edits a dict of column -> list of rows."""


def forge(
    path: Path,
    change: Change,
    *,
    metadata: dict[bytes, bytes] | None = None,
    checks: bool = True,
) -> None:
    """Rewrite a shard with changed columns under valid checksums."""
    file = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    batch = file.get_batch(0)
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    change(columns)
    stated = {**file.schema.metadata, **(metadata or {})}
    schema = file.schema.with_metadata({key: value for key, value in stated.items() if key != framing.LENGTH_KEY})
    names = [name for name in ("prompt_ids", "response_ids", "signal", "attention") if name in columns]
    columns["checks"] = [
        b"".join(cell_check(name, row, _bytes(columns[name][row])) for name in names)
        for row in range(len(columns["checks"]))
    ]
    forged = pa.RecordBatch.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    path.write_bytes(framing.write_frame(forged, fixed_parts(forged)))


def _bytes(cell: Any) -> bytes:
    return cell if isinstance(cell, bytes) else np.array(cell, np.int32).tobytes()


def replace_frame(cell: bytes, number: int, frame: bytes) -> bytes:
    """A payload cell with one of its zstandard frames exchanged. The signal cell has 4 frames at V = 300."""
    sizes = list(struct.unpack_from("<4I", cell))
    starts = [16 + sum(sizes[:index]) for index in range(4)]
    frames = [cell[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    frames[number] = frame
    return struct.pack("<4I", *map(len, frames)) + b"".join(frames)


def in_row(name: str, row: int, value: Any) -> Change:
    def change(columns: dict[str, Any]) -> None:
        columns[name][row] = value(columns[name][row]) if callable(value) else value

    return change


def compressed(values: Any, dtype: type) -> bytes:
    return zstandard.ZstdCompressor().compress(np.array(values, dtype).tobytes())


def replace_attention(cell: bytes, number: int, value: int) -> bytes:
    """The attention cell of the first record: 2 layers x 5 positions x 3 keys of one plane, shares, scalars."""
    sizes = struct.unpack_from("<3I", cell)
    starts = [12, 12 + sizes[0], 12 + sizes[0] + sizes[1]]
    frames = [cell[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    frames[number] = compressed([value] * 30, np.uint8)
    return struct.pack("<3I", *map(len, frames)) + b"".join(frames)


def reseal(data: bytearray) -> None:
    """Make index and seal of damaged bytes agree, where there is still a frame and a batch to take them of."""
    frame = framing.split_frame(np.frombuffer(bytes(data), np.uint8))
    framing.refuse_compression(frame)
    file = pa.ipc.open_file(pa.py_buffer(bytes(data)))
    metadata = dict(file.metadata or {})
    batch = file.get_batch(0)
    batch.validate()
    footer = frame.footer.replace(metadata[b"seal"], framing.BLANK_SEAL).replace(
        metadata[b"index"], framing.BLANK_INDEX
    )
    index = framing._index_digest(frame, footer, fixed_parts(batch))
    at = frame.footer_start + frame.footer.index(metadata[b"index"])
    data[at : at + 64] = index
    at = frame.footer_start + frame.footer.index(metadata[b"seal"])
    data[at : at + 64] = framing.BLANK_SEAL
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
