"""The teacher's head on response rows: kept ids, tail, entropy, curve, without holding more than one block of logits.

The vocabulary may lie split over tensor-parallel ranks. A rank sends its own top k and, once the joint top k is known,
the sums of its part of the tail and what was drawn from it: a few numbers a kept id, never logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from stages.errors import StageError
from stages.teacher_cache.draws import tally, uniforms
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.wire import write_columns
from stages.teacher_cache.logit_rows import LogitRows, logit_rows
from stages.teacher_cache.signals import complete, shorten
from stages.wide_topk import select_topk

_LOGITS_BYTES = 128 * 2**20
"""fp32 logits held at once by a rank. On a CPU the matrix product of 512 rows costs 20 % less a row than of 128."""


class ResponseHead:
    """One rank's part of the head. `lm_head` and `logits_processor` are the model's own."""

    def __init__(self, lm_head: Any, logits_processor: Any, spec: CaptureSpec) -> None:
        if logits_processor.soft_cap is not None:
            raise StageError("the teacher soft-caps its logits", hint="soft-capped heads are not captured yet")
        shard = lm_head.shard_indices
        self._selection, self._curve = spec.selection, spec.curve
        self.first_id = int(shard.org_vocab_start_index)
        self.width = int(shard.num_org_elements)
        if self._selection.k >= self.width:
            raise StageError(
                f"cache.k = {self._selection.k}, but one tensor-parallel rank holds {self.width} ids",
                hint="lower cache.k or teacher.tensor_parallel",
            )
        self._vocab_size, self._padded_width = lm_head.org_vocab_size, lm_head.num_embeddings_per_partition
        self._lm_head, self._logits_processor = lm_head, logits_processor
        self._weight_fp32: Tensor | None = None

    def summarise(self, hidden_ND: Tensor, keys_N: Tensor, rows_NW: Tensor) -> None:
        """Write what is kept of each row of `hidden_ND` into the columns of `rows_NW`; `keys_N` decide the draws."""
        step = max(1, _LOGITS_BYTES // (4 * self.width))
        for start in range(0, hidden_ND.shape[0], step):
            block = slice(start, start + step)
            logits = logit_rows(self.padded_logits(hidden_ND[block]), self.width)
            self._reduce(logits, keys_N[block], rows_NW[block])

    def logprobs(self, hidden_ND: Tensor) -> Tensor:
        """All log-probabilities [N, V], on every rank."""
        own_NV = self.logits(hidden_ND)
        # A rank whose shard is padded has fewer: all must send as many.
        own_NV = pad(own_NV, (0, self._padded_width - self.width), value=-torch.inf)
        gathered: Tensor = tensor_model_parallel_all_gather(own_NV.contiguous(), dim=-1)
        return gathered[:, : self._vocab_size].log_softmax(dim=-1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits of this rank's ids, without the padding of the vocabulary."""
        return self.padded_logits(hidden_ND)[:, : self.width].float()

    def padded_logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, P] in the type of the product; the columns from `width` on are padding."""
        if hidden_ND.device.type == "cpu" and self._logits_processor.head_dtype == torch.float32:
            return self._logits_fp32_on_cpu(hidden_ND)
        logits_NP: Tensor = self._logits_processor(self._lm_head, hidden_ND, None, skip_gather=True)
        return logits_NP

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

    def _reduce(self, logits: LogitRows, keys_N: Tensor, rows_NW: Tensor) -> None:
        # One more than is kept: the largest logit of the tail.
        values_NC, columns_NC = logits.largest(self._selection.k + 1)
        joint_NC, ids_NC, kept_NC = _join(values_NC, columns_NC + self.first_id)
        reference_N = joint_NC[:, -1].contiguous()
        own_NJ2, masses_NC = logits.take_out(
            columns_NC, kept_NC, reference_N, self._curve, masses=self._selection.draws > 0
        )
        sums_NJ2 = tensor_model_parallel_all_reduce(own_NJ2)
        ids_NK, exact_NK = ids_NC[:, :-1], joint_NC[:, :-1]
        logprobs_NK, log_tail_N, entropy_N, curve_NJ = complete(exact_NK, reference_N, sums_NJ2, self._curve)
        if self._selection.kind == "adaptive":
            ids_NK, logprobs_NK, log_tail_N, curve_NJ = shorten(
                ids_NK,
                logprobs_NK,
                log_tail_N,
                curve_NJ,
                mass=self._selection.mass,
                floor=self._selection.floor,
                curve=self._curve,
            )
        drawn = []
        if masses_NC is not None:
            drawn_ND, counts_ND, delta_ND = self._draw(logits, reference_N, masses_NC, keys_N)
            power_N = sums_NJ2[:, 0, 0]
            ids_NK = torch.cat([ids_NK, drawn_ND], dim=-1)
            logprobs_NK = torch.cat([logprobs_NK, delta_ND + (log_tail_N - power_N.log())[:, None]], dim=-1)
            drawn = [torch.cat([counts_ND.new_zeros(exact_NK.shape), counts_ND], dim=-1).int()]
        write_columns(rows_NW, ids_NK.int(), logprobs_NK, *drawn, log_tail_N, entropy_N, curve_NJ)

    def _draw(
        self, logits: LogitRows, reference_N: Tensor, masses_NC: Tensor, keys_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct ids drawn from the tail, how often, and their logits above the reference."""
        rank = get_tensor_model_parallel_rank()
        shares_NR = _gather_doubles(masses_NC.sum(dim=-1, keepdim=True))
        bounds_NR = pad(shares_NR.cumsum(dim=-1), (1, 0))
        targets_ND = uniforms(keys_N, self._selection.draws) * bounds_NR[:, -1:]
        # Every rank compares with the same bounds, so that each draw is exactly one rank's.
        owner_ND = torch.searchsorted(bounds_NR[:, 1:-1].contiguous(), targets_ND, right=True)
        targets_ND = (targets_ND - bounds_NR[:, rank, None]).clamp_(min=0)
        columns_ND, delta_ND = logits.drawn(reference_N, masses_NC, targets_ND)
        # The other ranks add nothing to a draw. An id below 2^24 is exact in single precision.
        mine_ND1 = (owner_ND == rank)[..., None]
        found_ND2 = torch.stack([(columns_ND + self.first_id).float(), delta_ND], dim=-1) * mine_ND1
        ids_ND, delta_ND = tensor_model_parallel_all_reduce(found_ND2).unbind(dim=-1)
        ids_ND, delta_ND, counts_ND = tally(ids_ND.long(), delta_ND, by_count=not self._selection.logprobs)
        return ids_ND, counts_ND, delta_ND


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


def _gather_doubles(own_N1: Tensor) -> Tensor:
    """[N, ranks]. Each goes as two floats, since not every backend gathers doubles: 48 bits, the same on all ranks."""
    large_N1 = own_N1.float()
    message_N2 = torch.cat([large_N1, (own_N1 - large_N1).float()], dim=-1)
    gathered: Tensor = tensor_model_parallel_all_gather(message_N2, dim=-1)
    return gathered.double().view(-1, gathered.shape[1] // 2, 2).sum(dim=-1)


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
