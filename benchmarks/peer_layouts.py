"""What others store of top-k log-probabilities, for the codec to be measured beside.

- DistillKit's layout (arcee-ai/DistillKit, `compression/`): ids in ceil(log2 V) bits, differences of log-probabilities,
  16 as float16, the others as a least-squares fit of six terms in float32; bits are unpacked one by one, as there.
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

from shards.record import Record

K, EXACT = 64, 16
PACKED = "bf16 and packed ids"


class DistillKitLayout:
    """16 exact values, six terms, ids bit by bit; N positions at once, as a record has them."""

    def __init__(self, vocab_size: int) -> None:
        self.bits = (vocab_size - 1).bit_length()
        place = torch.arange(K - EXACT, dtype=torch.float32)
        terms = [place**power for power in range(4)] + [place.sqrt(), torch.exp(-place)]
        self._terms = torch.stack(terms, dim=-1)
        self._fit = torch.linalg.pinv(self._terms.double()).float()

    def bytes(self) -> float:
        return -(-K * self.bits // 8) + 2 * EXACT + 4 * self._terms.shape[1]

    def encode(self, ids_NK: torch.Tensor, logprobs_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        steps = torch.cat([logprobs_NK[:, :1], logprobs_NK.diff(dim=-1)], dim=-1)
        order = torch.arange(self.bits - 1, -1, -1)
        bits = (ids_NK.long().unsqueeze(-1) >> order & 1).to(torch.uint8).view(len(ids_NK), -1, 8)
        packed = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(-1).to(torch.uint8)
        return packed, steps[:, :EXACT].half(), steps[:, EXACT:] @ self._fit.T

    def decode(self, packed: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bits = (packed.unsqueeze(-1) >> torch.arange(7, -1, -1) & 1).to(torch.uint8).view(len(packed), K, self.bits)
        ids_NK = (bits * 2 ** torch.arange(self.bits - 1, -1, -1)).sum(-1).long()
        fitted = (self._terms * terms.unsqueeze(-2)).sum(-1)
        return ids_NK, torch.cat([exact.float(), fitted], dim=-1).cumsum(-1)


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
