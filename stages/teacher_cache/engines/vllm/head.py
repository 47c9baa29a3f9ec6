"""The teacher's head on response rows: top-k, tail and entropy, without ever holding more than one block of logits.

The vocabulary may lie split over tensor-parallel ranks. A rank sends its own top k and, once the joint top k is known,
the two sums of its part of the tail: 2k + 4 numbers a row, never logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from stages.errors import StageError
from stages.teacher_cache.engines.vllm.wire import write_columns
from stages.teacher_cache.signals import complete, tail_sums
from stages.wide_topk import select_topk

_LOGITS_BYTES = 128 * 2**20
"""fp32 logits held at once by a rank. On a CPU the matrix product of 512 rows costs 20 % less a row than of 128."""
_CACHE_BYTES = 2 * 2**20
"""Logits that are reduced at once on a CPU: what stays in a core's second-level cache."""


class ResponseHead:
    """One rank's part of the head. `lm_head` and `logits_processor` are the model's own."""

    def __init__(self, lm_head: Any, logits_processor: Any, k: int) -> None:
        if logits_processor.soft_cap is not None:
            raise StageError("the teacher soft-caps its logits", hint="soft-capped heads are not captured yet")
        shard = lm_head.shard_indices
        self.k = k
        self.first_id = int(shard.org_vocab_start_index)
        self.width = int(shard.num_org_elements)
        if k >= self.width:
            raise StageError(
                f"cache.k = {k}, but one tensor-parallel rank holds {self.width} ids",
                hint="lower cache.k or teacher.tensor_parallel",
            )
        self._lm_head, self._logits_processor = lm_head, logits_processor
        self._weight_fp32: Tensor | None = None

    def summarise(self, hidden_ND: Tensor, rows_NW: Tensor) -> None:
        """Write ids, log-probs, log tail and entropy of each row of `hidden_ND` into the columns of `rows_NW`."""
        step = max(1, _LOGITS_BYTES // (4 * self.width))
        for start in range(0, hidden_ND.shape[0], step):
            logits_NV = self.logits(hidden_ND[start : start + step])
            self._reduce(logits_NV, rows_NW[start : start + step])

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits of this rank's ids, without the padding of the vocabulary."""
        if hidden_ND.device.type == "cpu" and self._logits_processor.head_dtype == torch.float32:
            logits_NV = self._logits_fp32_on_cpu(hidden_ND)
        else:
            logits_NV = self._logits_processor(self._lm_head, hidden_ND, None, skip_gather=True)
        return logits_NV[:, : self.width].float()

    def _logits_fp32_on_cpu(self, hidden_ND: Tensor) -> Tensor:
        """vLLM would widen the whole weight at each call; here once.

        Where body and weight are bfloat16 the operands stay exact when oneDNN narrows them again: products of two
        bfloat16 numbers are exact in fp32, in which it accumulates. So the tile units may do an fp32 head.
        """
        weight = self._lm_head.weight
        if self._weight_fp32 is None:
            self._weight_fp32 = weight.detach().float()
        exact = weight.dtype == hidden_ND.dtype == torch.bfloat16
        with _bfloat16_products(exact):
            logits_NV = torch.mm(hidden_ND.float(), self._weight_fp32.t())
        return logits_NV.mul_(self._logits_processor.scale) if self._logits_processor.scale != 1.0 else logits_NV

    def _reduce(self, logits_NV: Tensor, rows_NW: Tensor) -> None:
        count = logits_NV.shape[0]
        step = max(1, _CACHE_BYTES // (4 * self.width)) if logits_NV.device.type == "cpu" else count
        blocks = [slice(start, start + step) for start in range(0, count, step)]
        # One more than is kept: the largest logit of the tail.
        local = [select_topk(logits_NV[block], self.k + 1) for block in blocks]
        values_NC, columns_NC = (torch.cat(parts) for parts in zip(*local, strict=True))
        joint_NC, ids_NC, kept_NC = _join(values_NC, columns_NC + self.first_id)
        kept_NK, reference_N, ids_NK = joint_NC[:, :-1], joint_NC[:, -1], ids_NC[:, :-1]
        tail_N2 = torch.cat(
            [tail_sums(logits_NV[block], columns_NC[block], kept_NC[block], reference_N[block]) for block in blocks]
        )
        tail_N2 = tensor_model_parallel_all_reduce(tail_N2)
        write_columns(rows_NW, ids_NK.int(), *complete(kept_NK, reference_N, tail_N2))


def _join(values_NC: Tensor, ids_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The C = k + 1 largest over all ranks, and which of this rank's own candidates are among the first k."""
    ranks, candidates = get_tensor_model_parallel_world_size(), values_NC.shape[1]
    if ranks == 1:
        return values_NC, ids_NC, torch.arange(candidates, device=ids_NC.device).lt(candidates - 1).expand_as(ids_NC)
    # One message; ids go as the bit patterns of floats, since not every backend gathers integers.
    message_NC = torch.cat([values_NC, ids_NC.int().view(torch.float32)], dim=-1)
    gathered = tensor_model_parallel_all_gather(message_NC, dim=-1).view(-1, ranks, 2, candidates)
    all_values, id_bits = (part.reshape(-1, ranks * candidates) for part in gathered.unbind(dim=2))
    all_ids = id_bits.view(torch.int32)
    joint_NC, where_NC = select_topk(all_values, candidates)
    kept = torch.zeros_like(all_ids, dtype=torch.bool).scatter_(1, where_NC[:, :-1], True)
    own = get_tensor_model_parallel_rank() * candidates
    return joint_NC, all_ids.gather(1, where_NC), kept[:, own : own + candidates]


@contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if allowed:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
