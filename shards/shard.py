"""One shard, memory-mapped: any row without touching another, and no byte trusted before its checksum agrees.

- Opening checks everything that leads to a cell (the index); reading a row checks the cells of that row.
- `verify` checks every byte of the file.
- Sizes that the file states are bounded before anything is allocated by them.
- Only ShardError escapes, whatever the bytes; the message names the shard, and the row where there is one.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards import framing
from shards.codec import codec_for
from shards.contract import Contract
from shards.errors import Corrupt, ShardError, Truncated, UnknownVersion, unreadable
from shards.record import Int32, Record
from shards.schema import (
    CHECK_BYTES,
    LENGTHS,
    MAX_ENTRIES,
    MAX_PROMPT,
    MAX_ROWS,
    STATISTICS,
    TABLES,
    cell_check,
    cell_names,
    fixed_parts,
    numbers_of,
    schema_for,
)


class ShardReader:
    """A shard, open for reading. Use as a context manager, or `close` it."""

    def __init__(self, data: framing.Bytes, *, called: str) -> None:
        """Raises what `open` does. `called` is how messages call the shard."""
        self.called = called
        self._mapping: mmap.mmap | None = None
        with self._named():
            self._frame = framing.split_frame(data)
            framing.refuse_compression(self._frame)
            with _arrow_faults():
                file = pa.ipc.open_file(pa.py_buffer(data))
                self._footer_metadata = dict(file.metadata or {})
                self.contract, self.unit, self.split = self._described(file.schema.metadata or {})
                self._batch = _only_batch(file, schema_for(self.contract))
                parts = list(fixed_parts(self._batch))
            framing.check_index(self._frame, self._footer_metadata, parts)
            self._codec = codec_for(self.contract, self.tables)
            self._cells = {name: _Cells(self._batch.column(name)) for name in cell_names(self.contract)}
            self._checks = parts[-1].reshape(len(self), len(self._cells), CHECK_BYTES)
            self._lengths = {name: self.numbers(name).astype(np.int64) for name in LENGTHS}
            self._require_agreement()

    @classmethod
    def open(cls, path: Path, *, called: str | None = None) -> ShardReader:
        """Map a shard. Raises Truncated, Corrupt, UnknownVersion, StorageFailed, or Incomplete where there is none."""
        called = called or str(path)
        mapping = _map(path, called)
        shard = cls(np.frombuffer(mapping, np.uint8), called=called)
        shard._mapping = mapping
        return shard

    @classmethod
    def of(cls, data: bytes, *, called: str) -> ShardReader:
        """A shard whose bytes are in memory."""
        return cls(np.frombuffer(data, np.uint8), called=called)

    def release_pages(self) -> None:
        """Give the memory of what was read back to the system, which keeps it as long as it likes; reading goes on."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mapping. Arrays that were returned stay valid."""
        self._mapping = None
        del self._frame, self._batch, self._cells, self._checks

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    @property
    def sample_ids(self) -> list[str]:
        return list(self._batch.column("sample_id").to_pylist())

    @property
    def batch(self) -> pa.RecordBatch:
        """The rows as they lie in the file, their metadata included; no cell of it is checked."""
        return self._batch

    @property
    def tables(self) -> bytes | None:
        """The codec's learnt tables; None for a codec without."""
        if self.contract.tables is None:
            return None
        column = _Cells(self._batch.column(TABLES))
        if column.sizes[1:].any():
            raise Corrupt("it holds tables more than once", hint=framing.RESTORE)
        return bytes(column[0])

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._frame.data)

    def numbers(self, name: str) -> NDArray[np.int32] | NDArray[np.float32]:
        """A plain column of one number a row, no payload read. Raises ValueError where there is no such column."""
        if name not in (*LENGTHS, *STATISTICS):
            raise ValueError(f"no column of numbers {name!r}: there are {', '.join((*LENGTHS, *STATISTICS))}")
        return numbers_of(self._batch.column(name)).copy()

    def cell_sizes(self, name: str) -> NDArray[np.int64]:
        """Bytes of each row's cell in column `name`."""
        return self._cells[name].sizes

    def column_sizes(self) -> dict[str, int]:
        """Bytes of each column: values and offsets, without Arrow's padding."""
        return {name: self._batch.column(name).nbytes for name in self._batch.schema.names}

    def row_bytes(self, row: int) -> int:
        """Bytes of all cells of a row."""
        return sum(int(cells.sizes[row]) for cells in self._cells.values())

    def prompt(self, row: int) -> Int32:
        """The prompt of a row from 0, its payload not decoded. Raises Corrupt naming shard and row."""
        with self._named(row):
            return self._tokens("prompt_ids", row)

    def __getitem__(self, row: int) -> Record:
        """Decode one row. Raises Corrupt naming shard and row."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        with self._named(row):
            first, positions, entries, prompt_length, _ = (int(self._lengths[name][row]) for name in LENGTHS)
            response_ids_R = self._tokens("response_ids", row)
            labels_N = response_ids_R[first : first + positions]
            signal = self._codec.decode_signal(self._cell("signal", row), labels_N=labels_N, entries=entries)
            attention = None
            if self.contract.attention is not None:
                attention = self._codec.decode_attention(
                    self._cell("attention", row), positions=positions, prompt_length=prompt_length
                )
            return Record(
                sample_id=self._batch.column("sample_id")[row].as_py(),
                prompt_ids_P=self._tokens("prompt_ids", row),
                response_ids_R=response_ids_R,
                first_position=first,
                ids_NK=signal.ids_NK,
                logprobs_NK=signal.logprobs_NK,
                draws_NK=signal.draws_NK,
                log_tail_N=signal.log_tail_N,
                entropy_N=signal.entropy_N,
                curve_NJ=signal.curve_NJ,
                attention=attention,
            )

    def verify(self) -> None:
        """Raise Corrupt if any byte of the file differs from what was sealed, and name the row where there is one."""
        try:
            with self._named():
                framing.check_seal(self._frame, self._footer_metadata)
        except Corrupt:
            for row in range(len(self)):
                with self._named(row):
                    for name in self._cells:
                        self._cell(name, row)
            raise

    def _described(self, metadata: dict[bytes, bytes]) -> tuple[Contract, str, str]:
        """Contract, unit and split from the schema's metadata."""
        try:
            text, unit, split = (metadata[key].decode() for key in (b"contract", b"unit", b"split"))
        except (KeyError, UnicodeDecodeError) as error:
            raise Corrupt(f"its schema does not describe a shard ({error})", hint=framing.RESTORE) from error
        try:
            return Contract.from_json(text), unit, split
        except UnknownVersion:
            # A flipped bit may state another version too.
            framing.check_seal(self._frame, self._footer_metadata)
            raise

    def _tokens(self, name: str, row: int) -> Int32:
        ids = np.frombuffer(self._cell(name, row), np.int32).copy()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.contract.vocab_size:
            raise Corrupt(f"{name} holds an id outside the vocabulary", hint=framing.RESTORE)
        return ids

    def _cell(self, name: str, row: int) -> memoryview:
        cell = self._cells[name][row]
        expected = self._checks[row, list(self._cells).index(name)].tobytes()
        if cell_check(name, row, cell) != expected:
            raise Corrupt(f"{name} differs from its checksum", hint=framing.RESTORE)
        return cell

    def _require_agreement(self) -> None:
        """The plain columns must agree with each other and with the cells' offsets: decoding relies on them."""
        first, positions, entries, prompt, response = (self._lengths[name] for name in LENGTHS)
        agree = (
            (prompt * 4 == self.cell_sizes("prompt_ids"))
            & (response * 4 == self.cell_sizes("response_ids"))
            & (prompt >= 1)
            & (prompt <= MAX_PROMPT)
            & (positions >= 1)
            & (first >= 0)
            & (first + positions <= response)
            & (entries >= positions)
            & (entries <= positions * self.contract.selection.most_kept)
            & (entries <= MAX_ENTRIES)
        )
        if self.contract.attention is not None:
            spec, layers = self.contract.attention, len(self.contract.attention.layers)
            rows = positions + (np.maximum(prompt - 2, 0) if spec.rows == "all" else 0)
            agree &= (rows * layers * spec.top_m <= MAX_ENTRIES) & (prompt * layers <= MAX_ENTRIES)
        if not agree.all():
            row = int(np.argmin(agree))
            raise Corrupt(f"record {row}: its lengths and counts contradict each other", hint=framing.RESTORE)

    @contextlib.contextmanager
    def _named(self, row: int | None = None) -> Iterator[None]:
        """Put the shard's name, and the row's, before whatever is wrong with it."""
        try:
            yield
        except ShardError as error:
            where = self.called if row is None else f"{self.called}: record {row}"
            raise type(error)(f"{where}: {error}", hint=error.hint or framing.RESTORE) from error


class _Cells:
    """The values of a list or binary column as slices of the mapping."""

    def __init__(self, column: pa.Array) -> None:
        buffers = column.buffers()
        width = 4 if pa.types.is_list(column.type) else 1
        self._starts = np.frombuffer(buffers[1], np.int32, len(column) + 1).astype(np.int64) * width
        self._values = memoryview(buffers[-1]).cast("B") if buffers[-1] is not None else memoryview(b"")

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(self._starts)

    def __getitem__(self, row: int) -> memoryview:
        return self._values[self._starts[row] : self._starts[row + 1]]


def _map(path: Path, called: str) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise Truncated(f"{called}: it is empty", hint=framing.RESTORE)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(called, error, missing="check the path, or run stage one") from error


def _only_batch(file: pa.RecordBatchFileReader, schema: pa.Schema) -> pa.RecordBatch:
    if file.num_record_batches != 1 or not file.schema.equals(schema):
        raise Corrupt("its columns are not those of its contract", hint=framing.RESTORE)
    batch = file.get_batch(0)
    # Full: offsets rise and stay inside, ids are UTF-8. Costs a pass over the fixed parts, not over the cells.
    batch.validate(full=True)
    if not 1 <= batch.num_rows <= MAX_ROWS or any(column.offset for column in batch.columns):
        raise Corrupt(f"it states {batch.num_rows} rows", hint=framing.RESTORE)
    return batch


@contextlib.contextmanager
def _arrow_faults() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise Corrupt(f"its Arrow structure is damaged ({error})", hint=framing.RESTORE) from error
