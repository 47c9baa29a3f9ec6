"""The GGUF container, versions 2 and 3: metadata and tensors, by name.

Written down in the specification of GGUF, little-endian: magic, version, counts, then key-value pairs, then the tensor
table, then the data, each tensor at a multiple of the alignment. `gguf.GGUFReader` reads the same, but spends ten
seconds on a vocabulary of 49,152 tokens; this takes a fraction of one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from stages.errors import StageError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as the file holds it: blocks of a quantisation."""

    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    kind: GGMLQuantizationType
    data: NDArray[np.uint8]

    def dequantised(self) -> NDArray[np.float32]:
        """The weights in fp32."""
        block, size = GGML_QUANT_SIZES[self.kind]
        rows = self.data.reshape(*self.shape[:-1], self.shape[-1] // block * size)
        return np.require(dequantize(rows, self.kind), np.float32, ["W"]).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufContainer:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_gguf(path: Path) -> GgufContainer:
    """Open a GGUF file; tensors are views of the mapped file. Raises StageError where it is none, or damaged."""
    try:
        with path.open("rb") as file:
            cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _read(cursor)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise StageError(f"{path} cannot be read as GGUF: {error}", hint="fetch the file again") from error


def _read(cursor: _Cursor) -> GgufContainer:
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, known are {_VERSIONS}")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(pair_count)}
    table = [_table_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    return GgufContainer(
        metadata=metadata,
        tensors={name: _stored(cursor, shape, kind, start + offset) for name, shape, kind, offset in table},
    )


def _table_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, dimensions = cursor.string(), cursor.scalar("I")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    return name, shape, GGMLQuantizationType(cursor.scalar("I")), cursor.scalar("Q")


def _stored(cursor: _Cursor, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int) -> StoredTensor:
    block, size = GGML_QUANT_SIZES[kind]
    length = int(np.prod(shape)) // block * size
    return StoredTensor(shape=shape, kind=kind, data=np.frombuffer(cursor.buffer, np.uint8, length, start))


@dataclass(slots=True)
class _Cursor:
    """Reads the header from front to back."""

    buffer: mmap.mmap
    position: int = 0

    def take(self, length: int) -> bytes:
        data = self.buffer[self.position : self.position + length]
        if len(data) != length:
            raise ValueError("it ends within its header")
        self.position += length
        return data

    def scalar(self, code: str) -> Any:
        form = f"<{code}"
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(_SCALARS[kind])
