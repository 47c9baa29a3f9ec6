"""Records into tensors: right padding, masks from lengths, losses only at positions that the teacher predicted.

Decoder row i reads the start token (i = 0) or response token i-1, and is trained on response token i. `rows_N` picks,
from the flattened [B * T] decoder rows, those that the N rows of the teacher belong to; padding is never among them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.record import AttentionSummary, Float32, Record
from stages.distill.losses.attention import EncoderAttention, TeacherAttention
from stages.distill.losses.rows import TeacherRows, log_difference

Plan = TypeVar("Plan")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B records: what the student reads, and what the teacher said at N positions of them in all."""

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    """bool, true at tokens."""
    decoder_ids_BT: Tensor
    decoder_mask_BT: Tensor
    rows_N: Tensor
    """int64, index into the flattened [B * T] decoder rows."""
    teacher: TeacherRows
    attention: TeacherAttention | None
    """Of the N rows; None unless every record has a summary."""
    encoder_attention: EncoderAttention | None
    """Of rows of the prompts; None where the records have none."""

    @property
    def positions(self) -> int:
        return self.rows_N.shape[0]

    def to(self, device: torch.device) -> Batch:
        moved: Batch = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if value is None:
        return None
    return type(value)(**{name: _moved(getattr(value, name), device) for name in value.__slots__})


def assemble(records: Sequence[Record], start_token_id: int) -> Batch:
    """Pad records to the longest prompt and the longest response among them."""
    responses = [record.response_ids_R for record in records]
    inputs = [np.concatenate([[start_token_id], response[:-1]]) for response in responses]
    prompt_ids, prompt_mask = pad([record.prompt_ids_P for record in records])
    decoder_ids, decoder_mask = pad(inputs)
    width = decoder_ids.shape[1]
    spans = [range(record.first_position, record.first_position + record.positions) for record in records]
    return Batch(
        prompt_ids_BP=prompt_ids,
        prompt_mask_BP=prompt_mask,
        decoder_ids_BT=decoder_ids,
        decoder_mask_BT=decoder_mask,
        rows_N=torch.cat([torch.arange(span.start, span.stop) + b * width for b, span in enumerate(spans)]),
        teacher=teacher_rows(records),
        attention=_attention(records),
        encoder_attention=_encoder_attention(records, prompt_ids.shape[1]),
    )


def teacher_rows(records: Sequence[Record]) -> TeacherRows:
    """The cached side of all predicted positions of `records`, one after the other, with their labels."""
    widest = max(record.ids_NK.shape[1] for record in records)
    ids_NK = _stack([_widened(record.ids_NK, widest, -1) for record in records]).long()
    draws_NK = _stack([_widened(_draws(record), widest, 0) for record in records])
    log_kept_NK = _stack([_widened(_logprobs(record), widest, -np.inf) for record in records])
    log_tail_N = _stack([record.log_tail_N for record in records])
    present_NK, drawn_NK = ids_NK >= 0, draws_NK > 0
    drawn_mass_N = log_kept_NK.masked_fill(~drawn_NK, -torch.inf).logsumexp(1)
    log_part_NK = draws_NK.log() - draws_NK.sum(1, keepdim=True).log()
    curves = [record.curve_NJ for record in records if record.curve_NJ is not None]
    return TeacherRows(
        ids_NK=torch.where(present_NK, ids_NK, ids_NK[:, :1]),
        present_NK=present_NK,
        exact_NK=present_NK & ~drawn_NK,
        log_kept_NK=log_kept_NK,
        log_share_NK=torch.where(drawn_NK, log_part_NK + log_tail_N[:, None], log_kept_NK),
        log_rest_N=log_difference(log_tail_N, drawn_mass_N),
        log_tail_N=log_tail_N,
        entropy_N=_stack([record.entropy_N for record in records]),
        curve_NJ=_stack(curves) if len(curves) == len(records) else None,
        labels_N=_stack([record.labels_N for record in records]).long(),
    )


def _widened(rows_NK: NDArray[Any], width: int, filler: float) -> NDArray[Any]:
    missing = width - rows_NK.shape[1]
    return np.pad(rows_NK, ((0, 0), (0, missing)), constant_values=filler) if missing else rows_NK


def _draws(record: Record) -> Float32:
    none = np.zeros(record.ids_NK.shape, np.float32)
    return none if record.draws_NK is None else record.draws_NK.astype(np.float32)


def _logprobs(record: Record) -> Float32:
    if record.logprobs_NK is not None:
        return record.logprobs_NK
    return np.where(record.ids_NK >= 0, np.nan, -np.inf).astype(np.float32)


def pad(rows: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """Ids of rows of any lengths, and their mask, [B, longest]."""
    lengths = np.array([row.size for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)  # any id will do at padding: the mask alone tells it
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _stack(rows: Sequence[NDArray[Any]], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(rows, axis))


def _attention(records: Sequence[Record]) -> TeacherAttention | None:
    """Of the rows that predict the response: the last ones of every summary."""
    summaries = [record.attention for record in records if record.attention is not None]
    if len(summaries) < len(records):
        return None
    return _look(summaries, [slice(-record.positions, None) for record in records])


def _encoder_attention(records: Sequence[Record], width: int) -> EncoderAttention | None:
    """Of the prompt's rows, which stand before those; None where no record has them."""
    summaries, rows, queries, weights = [], [], [], []
    for b, record in enumerate(records):
        count = 0 if record.attention is None else record.attention.prompt_LN.shape[1] - record.positions
        if record.attention is not None and count:
            summaries.append(record.attention)
            queries.append(torch.arange(1, count + 1))
            rows.append(queries[-1] + b * width)
            weights.append(torch.full((count,), record.positions / count))
    if not summaries:
        return None
    return EncoderAttention(
        teacher=_look(summaries, [slice(0, len(query)) for query in queries]),
        rows_N=torch.cat(rows),
        queries_N=torch.cat(queries),
        weights_N=torch.cat(weights),
    )


def _look(summaries: Sequence[AttentionSummary], rows: Sequence[slice]) -> TeacherAttention:
    chosen = list(zip(summaries, rows, strict=True))
    return TeacherAttention(
        positions_LNM=_stack([summary.positions_LNM[:, part] for summary, part in chosen], 1).long(),
        weights_LNM=_stack([summary.weights_LNM[:, part] for summary, part in chosen], 1),
        prompt_LN=_stack([summary.prompt_LN[:, part] for summary, part in chosen], 1),
    )


class Prefetcher(Iterator[Made], Generic[Plan, Made]):
    """Makes what is planned on threads, a bounded number ahead, and hands it out in the planned order.

    An exception of `make` reaches the one who iterates, at the item it belongs to.
    """

    def __init__(
        self, make: Callable[[Plan], Made], plans: Iterable[Plan], *, threads: int = 2, ahead: int = 4
    ) -> None:
        self.waited = 0.0
        """Seconds for which the consumer stood still."""
        self._make = make
        self._plans = iter(plans)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-reader")
        self._coming: deque[Future[Made]] = deque()
        self._order(ahead)

    def __next__(self) -> Made:
        if not self._coming:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        made = self._coming.popleft().result()
        self.waited += time.perf_counter() - start
        self._order(1)
        return made

    def close(self) -> None:
        """Let go of the threads; what they have begun is finished and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _order(self, count: int) -> None:
        self._coming.extend(self._pool.submit(self._make, plan) for plan in islice(self._plans, count))
