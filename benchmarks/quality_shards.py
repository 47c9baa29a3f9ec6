"""What a cache keeps of a teacher that is known in full, as shards that the product writes and reads.

Ids are selected by stage one's own arithmetic and go through the real codec: students of the quality benchmark learn
from what it decodes, and the bytes of a position are those that it wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.quality_teacher import END, HOME, PROMPT, RESPONSE, START, TEACHER, VOCAB, Response, responses
from benchmarks.teacher_logits import LAYERS, TOP_M
from shards.contract import AttentionSpec, Contract, Selection
from shards.learnt import EXAMPLES, with_tables
from shards.manifest import begin, is_sealed, seal
from shards.planes.codec import Planes3
from shards.reader import ShardSet
from shards.record import Record
from shards.storage import storage_at
from shards.writer import write_shard
from stages.teacher_cache.draws import block_masses, draw_key, drawn_columns, position_keys, tally, uniforms
from stages.teacher_cache.signals import complete, mask_kept, tail_sums
from stages.wide_topk import select_topk

SPLIT = "train"
ROWS = 128
SET_POSITIONS = 250_000
"""Positions of a shard over which its tables are spread; the sets of this benchmark are smaller than real ones."""
TABLES_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one set keeps of each position."""

    selection: Selection
    curve: tuple[float, ...] = ()
    attention: bool = False

    @property
    def name(self) -> str:
        chosen = self.selection
        size = "-".join(str(count) for count in (chosen.k, chosen.draws) if count)
        return f"{chosen.kind}-{size}{'-curve' if self.curve else ''}{'-attention' if self.attention else ''}"

    def contract(self) -> Contract:
        return Contract(
            codec=Planes3.name,
            teacher=TEACHER,
            teacher_fingerprint="",
            tokenizer_fingerprint="",
            vocab_size=VOCAB,
            start_token_id=START,
            end_token_id=END,
            selection=self.selection,
            curve=self.curve,
            attention=AttentionSpec(layers=LAYERS, top_m=TOP_M) if self.attention else None,
            corpus_fingerprint=f"{PROMPT}+{RESPONSE}",
            engine="transformers",
            dtype="bfloat16+float32",
        )


def shard_set(kept: Kept, home: Path = HOME) -> ShardSet:
    """The training split as `kept` caches it, written by the first who asks; record n is response n."""
    folder = home / kept.name
    if not is_sealed(folder):
        _write(folder, kept, responses(SPLIT))
    return ShardSet(folder)


def bytes_a_position(shards: ShardSet) -> float:
    """Payload of signal and attention, and the tables' share in a shard of SET_POSITIONS."""
    readers = [shards.open(info) for info in shards.manifest.shards]
    columns = ("signal", "attention") if shards.contract.attention else ("signal",)
    cells = sum(len(cell.as_buffer()) for reader in readers for name in columns for cell in reader.batch.column(name))
    tables = len(readers[0].batch.column("tables")[0].as_buffer())
    return cells / shards.manifest.totals()["positions"] + tables / SET_POSITIONS


def record_of(index: int, response: Response, kept: Kept) -> Record:
    """One response as stage one would have cached it."""
    selection, logits_NV = kept.selection, response.whole()
    keys_N = position_keys(draw_key(0, _sample_id(index)), torch.arange(len(logits_NV)))
    head = exact_head(logits_NV, selection.k, kept.curve)
    ids_NK, logprobs_NK = head.ids_NK, head.logprobs_NK
    draws_NK = None
    if selection.draws:
        drawn_ND, logprobs_ND, counts_ND = _drawn(logits_NV, head.reference_N, keys_N, selection)
        draws_NK = torch.cat([torch.zeros_like(ids_NK), counts_ND], 1).int().numpy()
        ids_NK, logprobs_NK = torch.cat([ids_NK, drawn_ND], 1), torch.cat([logprobs_NK, logprobs_ND], 1)
    return Record(
        sample_id=_sample_id(index),
        prompt_ids_P=response.prompt_ids_P,
        response_ids_R=response.response_ids_R,
        first_position=0,
        ids_NK=ids_NK.int().numpy(),
        logprobs_NK=logprobs_NK.numpy() if selection.logprobs else None,
        draws_NK=draws_NK,
        log_tail_N=head.log_tail_N.numpy(),
        entropy_N=head.entropy_N.numpy(),
        curve_NJ=head.curve_NJ.numpy() if kept.curve else None,
        attention=response.attention if kept.attention else None,
    )


class ExactHead(NamedTuple):
    ids_NK: Tensor
    logprobs_NK: Tensor
    log_tail_N: Tensor
    entropy_N: Tensor
    curve_NJ: Tensor
    reference_N: Tensor
    """The largest logit outside the head."""


def exact_head(logits_NV: Tensor, k: int, curve: Sequence[float]) -> ExactHead:
    """The k most probable ids of each row, and what a cache holds of the others. Masks the kept logits, in place."""
    values_NC, columns_NC = select_topk(logits_NV, k + 1)
    reference_N, ids_NK = values_NC[:, -1].contiguous(), columns_NC[:, :-1]
    mask_kept(logits_NV, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool), reference_N)
    sums_NJ2 = tail_sums(logits_NV, reference_N, curve)
    return ExactHead(ids_NK, *complete(values_NC[:, :-1], reference_N, sums_NJ2, curve), reference_N)


def _drawn(
    logits_NV: Tensor, reference_N: Tensor, keys_N: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids, their log-probabilities and counts; `logits_NV` are log-probabilities, the kept ones masked."""
    masses_NC = block_masses(logits_NV, reference_N)
    targets_ND = uniforms(keys_N, selection.draws) * masses_NC.sum(1, keepdim=True)
    columns_ND = drawn_columns(logits_NV, reference_N, masses_NC, targets_ND)
    return tally(columns_ND, logits_NV.gather(1, columns_ND), by_count=not selection.logprobs)


def _write(folder: Path, kept: Kept, found: Sequence[Response]) -> None:
    storage = storage_at(folder)
    records = [record_of(index, response, kept) for index, response in enumerate(found)]
    contract, tables = with_tables(
        storage, kept.contract(), lambda: records[:: -(-len(records) // EXAMPLES)], budget=TABLES_BYTES
    )
    begin(storage, contract)
    infos = [
        write_shard(storage, f"{SPLIT}-{start:05}", SPLIT, contract, records[start : start + ROWS], tables=tables)
        for start in range(0, len(records), ROWS)
    ]
    seal(storage, contract, infos)


def _sample_id(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()[:16]
