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
from stages.distill.losses.attention import TeacherAttention
from stages.distill.losses.rows import TeacherRows

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
    prompt_ids, prompt_mask = _pad([record.prompt_ids_P for record in records])
    decoder_ids, decoder_mask = _pad(inputs)
    width = decoder_ids.shape[1]
    spans = [range(record.first_position, record.first_position + record.positions) for record in records]
    return Batch(
        prompt_ids_BP=prompt_ids,
        prompt_mask_BP=prompt_mask,
        decoder_ids_BT=decoder_ids,
        decoder_mask_BT=decoder_mask,
        rows_N=torch.cat([torch.arange(span.start, span.stop) + b * width for b, span in enumerate(spans)]),
        teacher=TeacherRows(
            ids_NK=_stack([record.ids_NK for record in records]).long(),
            log_kept_NK=_stack([_logprobs(record) for record in records]),
            log_rest_N=_stack([record.log_tail_N for record in records]),
            labels_N=_stack(
                [response[span.start : span.stop] for response, span in zip(responses, spans, strict=True)]
            ).long(),
        ),
        attention=_attention([record.attention for record in records]),
    )


def _logprobs(record: Record) -> Float32:
    assert record.logprobs_NK is not None, "the one selection that is written keeps log-probabilities"
    return record.logprobs_NK


def _pad(rows: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
    lengths = np.array([row.size for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)  # any id will do at padding: the mask alone tells it
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _stack(rows: Sequence[NDArray[Any]], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(rows, axis))


def _attention(summaries: Sequence[AttentionSummary | None]) -> TeacherAttention | None:
    present = [summary for summary in summaries if summary is not None]
    if len(present) < len(summaries):
        return None
    return TeacherAttention(
        positions_LNM=_stack([summary.positions_LNM for summary in present], 1).long(),
        weights_LNM=_stack([summary.weights_LNM for summary in present], 1),
        prompt_LN=_stack([summary.prompt_LN for summary in present], 1),
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
