"""What the teacher says about a response, and the tensor maths that reduces its logits and attention to it.

Pure functions of tensors, on whatever device they lie on; they know no engine, no request and no parallelism. A
vocabulary may be split: every function here works on one shard of it and returns sums that add up over shards.

Shape suffixes as in `shards.record`; besides, S is the number of keys and d the width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSignal:
    """Head-mean attention of the chosen layers; the fields are those of `shards.record.AttentionSummary`."""

    positions_LNM: Tensor
    weights_LNM: Tensor
    sink_LN: Tensor
    prompt_LN: Tensor
    entropy_LN: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal:
    """The teacher's distributions over the N response tokens of one sample; the fields are those of a `Record`."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    log_tail_N: Tensor
    entropy_N: Tensor
    attention: AttentionSignal | None


def tail_sums(logits_NV: Tensor, columns_NC: Tensor, kept_NC: Tensor, reference_N: Tensor) -> Tensor:
    """[N, 2]: the sums of e^d and of d e^d over all columns that are not kept, d = logit - reference.

    `columns_NC` are distinct, and `kept_NC` says which of them are kept. With the largest logit of the whole tail as
    reference d <= 0 and the first sum is at least 1 over all shards: nothing overflows, and a tail however thin keeps
    its digits, which 1 - sum(p) would cancel.
    """
    delta_NV = logits_NV - reference_N[:, None]
    power_NV = delta_NV.exp()
    power_NV.scatter_(-1, columns_NC, power_NV.gather(-1, columns_NC).masked_fill(kept_NC, 0.0))
    return torch.stack([power_NV.sum(dim=-1), torch.linalg.vecdot(power_NV, delta_NV)], dim=-1)


def complete(kept_NK: Tensor, reference_N: Tensor, tail_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, K], log tail mass [N] and entropy [N] from the kept logits and the tail's sums.

    `tail_N2` is what `tail_sums` with this reference adds up to over all shards.
    """
    power_N, moment_N = tail_N2.unbind(dim=-1)
    log_power_N = reference_N + power_N.log()
    log_partition_N = torch.logaddexp(kept_NK.logsumexp(dim=-1), log_power_N)
    logprobs_NK = kept_NK - log_partition_N[:, None]
    shift_N = reference_N - log_partition_N
    tail_entropy_N = -shift_N.exp() * (moment_N + shift_N * power_N)
    entropy_N = tail_entropy_N - (logprobs_NK.exp() * logprobs_NK).sum(dim=-1)
    return logprobs_NK, log_power_N - log_partition_N, entropy_N


def attention_heads_sum(
    queries_NHd: Tensor, keys_SHd: Tensor, *, first_row: int, scale: float, window: int | None
) -> Tensor:
    """[N, S]: softmax attention in fp32, summed over the heads; keys may have fewer heads (GQA).

    Query n stands at position `first_row + n` and sees the keys 0 .. first_row + n, or the last `window` of them.
    """
    rows, heads, width = queries_NHd.shape
    span, key_heads, _ = keys_SHd.shape
    grouped = queries_NHd.float().mul(scale).view(rows, key_heads, heads // key_heads, width)
    grouped = grouped.permute(1, 2, 0, 3).reshape(key_heads, -1, width)
    scores = torch.bmm(grouped, keys_SHd.float().permute(1, 2, 0)).view(heads, rows, span)
    key_S = torch.arange(span, device=scores.device)
    row_N1 = torch.arange(first_row, first_row + rows, device=scores.device)[:, None]
    hidden_NS = key_S > row_N1
    if window is not None:
        hidden_NS |= key_S <= row_N1 - window
    return scores.masked_fill_(hidden_NS, -torch.inf).softmax(dim=-1).sum(dim=0)


def summarise_attention(mean_NS: Tensor, prompt_length: int, top_m: int) -> tuple[Tensor, ...]:
    """Positions [N, M], weights [N, M], sink [N], prompt mass [N] and entropy [N] of head-mean attention rows."""
    rows = mean_NS.shape[0]
    prompt_keys = mean_NS[:, 1:prompt_length]
    positions_NM = mean_NS.new_full((rows, top_m), -1, dtype=torch.int32)
    weights_NM = mean_NS.new_zeros((rows, top_m))
    kept = min(top_m, prompt_keys.shape[1])
    weights_NM[:, :kept], where = prompt_keys.topk(kept, dim=-1)
    positions_NM[:, :kept] = where.int() + 1
    entropy_N = torch.special.entr(mean_NS).sum(dim=-1)
    return positions_NM, weights_NM, mean_NS[:, 0], prompt_keys.sum(dim=-1), entropy_N
