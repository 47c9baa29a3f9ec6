"""The bytes of a shard: one Arrow IPC file with one record batch, and the two digests that its footer carries.

    ARROW1 | schema message | batch message | body | end of stream | footer | footer size | ARROW1
    '------------- envelope ----------------'      '---------------- envelope -------------------'

- `index` covers the envelope and the fixed parts of every column: whatever leads to a cell. Checked at every open.
- `seal` covers the whole file, padding included. Checked by verify.
- Each digest is taken with its own 64 digits replaced by a letter, so that a shard can be checked alone.
- The schema states the length of the file, so that a cut file is told from a damaged one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import Corrupt, ShardError, Truncated

Bytes = NDArray[np.uint8]

MAGIC = b"ARROW1"
LENGTH_KEY = b"bytes"
LENGTH_DIGITS = 20
BLANK_INDEX, BLANK_SEAL = b"i" * 64, b"s" * 64
RESTORE = (
    "restore the file, or set it aside with verify-shards --quarantine and run the command that made the set again: "
    "it makes anew only what is missing"
)
"""For a set that is sealed; see `units` for one that is not."""

_CONTINUATION = 0xFFFFFFFF
_END_OF_STREAM = 8
_TRAILER = 4 + len(MAGIC)
_MESSAGE_HEADER, _BATCH_COMPRESSION = 2, 3
"""Field numbers in Arrow's Message.fbs: Message.header, RecordBatch.compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where the parts of a shard lie in its bytes."""

    data: Bytes
    batch_message: bytes
    body_start: int
    body_end: int
    footer_start: int

    @property
    def footer(self) -> bytes:
        return self.data[self.footer_start : -_TRAILER].tobytes()


def write_frame(batch: pa.RecordBatch, fixed_parts: Iterable[Bytes]) -> bytes:
    """Serialise a batch into a sealed shard. `fixed_parts` are the batch's, as the index covers them."""
    length = len(_arrow_file(batch, 0))
    data = bytearray(_arrow_file(batch, length))
    assert len(data) == length, "the length has a fixed number of digits"
    frame = split_frame(np.frombuffer(data, np.uint8))
    index = _index_digest(frame, frame.footer, fixed_parts)
    _fill(data, frame, BLANK_INDEX, index)
    _fill(data, frame, BLANK_SEAL, hashlib.sha256(data).hexdigest().encode())
    return bytes(data)


def split_frame(data: Bytes) -> Frame:
    """Find the parts of a shard. Raises Truncated, or Corrupt where the length is right and the structure is not."""
    footer_start = _footer_start(data)
    if footer_start is None:
        raise _cut_or_corrupt(data)
    try:
        _, batch_start = _message(data, 8)
        batch_message, body_start = _message(data, batch_start)
    except (struct.error, ValueError, EOFError) as error:
        raise Corrupt(f"no Arrow messages where they must be ({error})", hint=RESTORE) from error
    body_end = footer_start - _END_OF_STREAM
    if body_start > body_end:
        raise Corrupt("the footer overlaps the records", hint=RESTORE)
    return Frame(
        data=data, batch_message=batch_message, body_start=body_start, body_end=body_end, footer_start=footer_start
    )


def refuse_compression(frame: Frame) -> None:
    """Shards hold plain Arrow buffers: a compressed one would be expanded before any of our limits applies."""
    try:
        batch = _field(frame.batch_message, _root(frame.batch_message), _MESSAGE_HEADER)
        compressed = batch is not None and _field(frame.batch_message, batch, _BATCH_COMPRESSION) is not None
    except struct.error as error:
        raise Corrupt(f"the batch's description is damaged ({error})", hint=RESTORE) from error
    if compressed:
        raise Corrupt("its Arrow buffers are compressed, which no shard's are", hint=RESTORE)


def check_index(frame: Frame, footer_metadata: Mapping[bytes, bytes], fixed_parts: Iterable[Bytes]) -> None:
    """Raise Corrupt if anything that leads to a cell has changed."""
    footer, _ = _blanked(frame.footer, footer_metadata, b"seal", BLANK_SEAL)
    footer, stated = _blanked(footer, footer_metadata, b"index", BLANK_INDEX)
    if _index_digest(frame, footer, fixed_parts) != stated:
        raise Corrupt("its header, footer or plain columns differ from their checksum", hint=RESTORE)


def check_seal(frame: Frame, footer_metadata: Mapping[bytes, bytes]) -> None:
    """Raise Corrupt if any byte of the file has changed."""
    footer, stated = _blanked(frame.footer, footer_metadata, b"seal", BLANK_SEAL)
    digest = hashlib.sha256(frame.data[: frame.footer_start].data)
    digest.update(footer)
    digest.update(frame.data[-_TRAILER:].data)
    if digest.hexdigest().encode() != stated:
        raise Corrupt("its bytes differ from its seal", hint=RESTORE)


def _arrow_file(batch: pa.RecordBatch, length: int) -> bytes:
    stated = {**(batch.schema.metadata or {}), LENGTH_KEY: f"{length:0{LENGTH_DIGITS}d}".encode()}
    batch = batch.replace_schema_metadata(stated)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, metadata={b"index": BLANK_INDEX, b"seal": BLANK_SEAL}) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _index_digest(frame: Frame, footer: bytes, fixed_parts: Iterable[Bytes]) -> bytes:
    digest = hashlib.sha256(frame.data[: frame.body_start].data)
    digest.update(frame.data[frame.body_end : frame.footer_start].data)
    digest.update(footer)
    digest.update(frame.data[-_TRAILER:].data)
    for part in fixed_parts:
        digest.update(part.data)
    return digest.hexdigest().encode()


def _fill(data: bytearray, frame: Frame, blank: bytes, digits: bytes) -> None:
    at = frame.footer_start + frame.footer.index(blank)
    data[at : at + len(digits)] = digits


def _blanked(footer: bytes, metadata: Mapping[bytes, bytes], key: bytes, blank: bytes) -> tuple[bytes, bytes]:
    """The footer with one digest replaced by its blank, and that digest."""
    digits = metadata.get(key, b"")
    if len(digits) != len(blank) or footer.count(digits) != 1:
        raise Corrupt(f"its footer carries no {key.decode()}", hint=RESTORE)
    return footer.replace(digits, blank), digits


def _footer_start(data: Bytes) -> int | None:
    """Where the footer starts; None where the file does not end as an Arrow file does."""
    if len(data) < 8 + _TRAILER or data[-len(MAGIC) :].tobytes() != MAGIC:
        return None
    (size,) = struct.unpack("<i", data[-_TRAILER : -len(MAGIC)].tobytes())
    start = len(data) - _TRAILER - size
    return start if size > 0 and start >= 8 + _END_OF_STREAM else None


def _cut_or_corrupt(data: Bytes) -> ShardError:
    try:
        _, end = _message(data, 8)
        metadata = pa.ipc.read_schema(pa.py_buffer(data[8:end].tobytes())).metadata or {}
        stated = int(metadata[LENGTH_KEY])
    except (struct.error, EOFError):
        return Truncated(f"it ends after {len(data)} bytes, within its header", hint=RESTORE)
    except (pa.ArrowException, ValueError, KeyError, OSError):
        return Corrupt("it does not start as a shard does", hint=RESTORE)
    if len(data) < stated:
        return Truncated(f"it ends after {len(data)} of {stated} bytes", hint=RESTORE)
    return Corrupt("it does not end as a shard does", hint=RESTORE)


def _message(data: Bytes, start: int) -> tuple[bytes, int]:
    """One encapsulated Arrow message at `start`: its flatbuffer, and where it ends. EOFError if the data ends first."""
    if data[: len(MAGIC)].tobytes() != MAGIC[: len(data)]:
        raise ValueError("no Arrow file")
    continuation, size = struct.unpack("<Ii", data[start : start + 8].tobytes())
    if continuation != _CONTINUATION or size < 8:
        raise ValueError(f"no message at byte {start}")
    end = start + 8 + size
    if end > len(data):
        raise EOFError(f"a message at byte {start} ends at {end}, the file at {len(data)}")
    return data[start + 8 : end].tobytes(), end


def _root(buffer: bytes) -> int:
    return int(struct.unpack_from("<I", buffer, 0)[0])


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Where a flatbuffer table's sub-table lies; None where the field is absent."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if vtable < 0:
        raise struct.error("a table points before its buffer")
    (vtable_size,) = struct.unpack_from("<H", buffer, vtable)
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, vtable + slot)[0] if slot < vtable_size else 0
    if not offset:
        return None
    return int(table + offset + struct.unpack_from("<I", buffer, table + offset)[0])
