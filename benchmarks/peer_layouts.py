"""What others store of top-k log-probabilities, for the codec to be measured beside.

- DistillKit's layout (arcee-ai/DistillKit, `compression/`): ids in ceil(log2 V) bits, differences of log-probabilities,
  16 as float16, the others as a least-squares fit of six terms in float32. Once as there, in torch, where bits are
  unpacked one by one, and once in compiled loops.
- bf16 log-probabilities beside packed ids, by formula; plain typed columns in Arrow and Parquet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from shards.compiled import compiled
from shards.record import Float32, Int32, Record

Bytes = NDArray[np.uint8]

K, EXACT = 64, 16
PACKED = "bf16 and packed ids"


class DistillKitLayout:
    """16 exact values, six terms, ids bit by bit; N positions at once, as a record has them."""

    def __init__(self, vocab_size: int) -> None:
        self.bits = (vocab_size - 1).bit_length()
        place = torch.arange(K - EXACT, dtype=torch.float32)
        terms = [place**power for power in range(4)] + [place.sqrt(), torch.exp(place)]
        self.terms = torch.stack(terms, dim=-1)
        scales = self.terms.double().amax(dim=0)  # e^47 is beyond what a fit of plain columns can hold
        self.fit = (torch.linalg.pinv(self.terms.double() / scales) / scales[:, None]).float()

    def bytes(self) -> float:
        return -(-K * self.bits // 8) + 2 * EXACT + 4 * self.terms.shape[1]

    def encode(self, ids_NK: torch.Tensor, logprobs_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = torch.cat([logprobs_NK[:, :1], logprobs_NK.diff(dim=-1)], dim=-1)
        order = torch.arange(self.bits - 1, -1, -1)
        bits = (ids_NK.long().unsqueeze(-1) >> order & 1).to(torch.uint8).view(len(ids_NK), -1, 8)
        packed = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(-1).to(torch.uint8)
        return packed, steps[:, :EXACT].half(), steps[:, EXACT:] @ self.fit.T

    def decode(self, packed: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bits = (packed.unsqueeze(-1) >> torch.arange(7, -1, -1) & 1).to(torch.uint8).view(len(packed), K, self.bits)
        ids_NK = (bits * 2 ** torch.arange(self.bits - 1, -1, -1)).sum(-1).long()
        fitted = (self.terms * terms.unsqueeze(-2)).sum(-1)
        return ids_NK, torch.cat([exact.float(), fitted], dim=-1).cumsum(-1)


class CompiledLayout:
    """The same bytes in loops that are compiled as the codec's are: what the layout itself costs."""

    def __init__(self, layout: DistillKitLayout) -> None:
        self._bits = layout.bits
        self._terms, self._fit = layout.terms.numpy(), layout.fit.numpy()

    def encode(self, ids_NK: Int32, logprobs_NK: Float32) -> tuple[Bytes, NDArray[np.float16], Float32]:
        steps_NK = np.diff(logprobs_NK, axis=1, prepend=np.float32(0))
        packed = np.zeros((len(ids_NK), -(-K * self._bits // 8)), np.uint8)
        _pack(ids_NK, self._bits, packed)
        return packed, steps_NK[:, :EXACT].astype(np.float16), steps_NK[:, EXACT:] @ self._fit.T

    def decode(self, packed: Bytes, exact: NDArray[np.float16], terms: Float32) -> tuple[Int32, Float32]:
        ids_NK, logprobs_NK = np.empty((len(packed), K), np.int32), np.empty((len(packed), K), np.float32)
        _unpack(packed, self._bits, exact.astype(np.float32), terms, self._terms, ids_NK, logprobs_NK)
        return ids_NK, logprobs_NK


@compiled
def _pack(ids_NK: Int32, bits: int, packed: Bytes) -> None:
    for row in range(len(ids_NK)):
        held, count, at = 0, 0, 0
        for place in range(ids_NK.shape[1]):
            held, count = held << bits | ids_NK[row, place], count + bits
            while count >= 8:
                count -= 8
                packed[row, at] = held >> count & 255
                at += 1
            held &= (1 << count) - 1
        if count:
            packed[row, at] = held << 8 - count & 255


@compiled
def _unpack(
    packed: Bytes, bits: int, exact: Float32, terms: Float32, basis: Float32, ids_NK: Int32, logprobs_NK: Float32
) -> None:
    for row in range(len(packed)):
        held, count, at, value = 0, 0, 0, np.float32(0)
        for place in range(ids_NK.shape[1]):
            while count < bits:
                held, count = held << 8 | packed[row, at], count + 8
                at += 1
            count -= bits
            ids_NK[row, place] = held >> count
            held &= (1 << count) - 1
            if place < exact.shape[1]:
                value += exact[row, place]
            else:
                for term in range(basis.shape[1]):
                    value += terms[row, term] * basis[place - exact.shape[1], term]
            logprobs_NK[row, place] = value


def distillkit_records(test: Sequence[Record], layout: DistillKitLayout) -> list[Record]:
    """What the layout gives back; the tail is what the kept ids leave, since it stores none."""
    found = []
    for record in test:
        assert record.logprobs_NK is not None
        packed = layout.encode(torch.tensor(record.ids_NK), torch.tensor(record.logprobs_NK))
        ids_NK, logprobs_NK = (part.numpy() for part in layout.decode(*packed))
        assert (ids_NK == record.ids_NK).all()
        left_N = (1 - np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)).clip(1e-9)
        tail_N = np.log(left_N).astype(np.float32)
        found.append(dataclasses.replace(record, logprobs_NK=logprobs_NK, log_tail_N=tail_N))
    return found


def plain_bytes(test: Sequence[Record], folder: Path) -> dict[str, float]:
    """Bytes a position of plain typed columns, one row a record."""
    positions = sum(record.positions for record in test)
    columns = {
        name: pa.array([getattr(record, name).ravel() for record in test])
        for name in ("ids_NK", "logprobs_NK", "log_tail_N", "entropy_N")
    }
    table = pa.table(columns)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as file:
        file.write_table(table)
    pq.write_table(table, folder / "a.parquet", compression="zstd", compression_level=9)
    return {
        "raw Arrow": (folder / "a.arrow").stat().st_size / positions,
        "Parquet, zstd 9": (folder / "a.parquet").stat().st_size / positions,
    }


def packed_bytes(k: int, vocab_size: int) -> float:
    """Of one position."""
    return k * (16 + (vocab_size - 1).bit_length()) / 8
