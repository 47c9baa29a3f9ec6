"""What the teacher says about a response, and the tensor maths that reduces its logits and attention to it.

Pure functions of tensors, on whatever device they lie on; they know no engine, no request and no parallelism. A
vocabulary may be split: every function here works on one shard of it and returns sums that add up over shards.

Shape suffixes as in `shards.record`; besides, S is the number of keys and d the width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_NOTHING = -1e4
"""A logit this far below another is nothing beside it: e^(b d) is 0 in single precision for every b from 0.011."""


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
    logprobs_NK: Tensor | None
    draws_NK: Tensor | None
    log_tail_N: Tensor
    entropy_N: Tensor
    curve_NJ: Tensor | None
    attention: AttentionSignal | None


def mask_kept(logits_NV: Tensor, columns_NC: Tensor, kept_NC: Tensor, reference_N: Tensor) -> None:
    """Take the kept of the columns `columns_NC`, which are distinct, out of the logits, in place.

    They become so small that any power of their probability is 0, and finite, so that 0 times them is 0.
    """
    low_NC = (reference_N[:, None] + _NOTHING).expand_as(columns_NC)
    logits_NV.scatter_(-1, columns_NC, torch.where(kept_NC, low_NC, logits_NV.gather(-1, columns_NC)))


def tail_sums(logits_NV: Tensor, reference_N: Tensor, curve: Sequence[float] = ()) -> Tensor:
    """[N, 1 + J, 2]: the sums of e^(b d) and of d e^(b d), d = logit - reference, for b = 1 and the J nodes of `curve`.

    With the largest logit of the whole tail as reference d <= 0 and every first sum is at least 1 over all shards:
    nothing overflows, and a tail however thin keeps its digits, which 1 - sum(p) would cancel.
    """
    delta_NV = logits_NV - reference_N[:, None]
    sums: dict[float, Tensor] = {}
    below, power_NV = 0.0, delta_NV
    for node in sorted((1.0, *curve)):
        # A square costs a tenth of an exponential.
        power_NV = power_NV.square() if node == 2 * below else (delta_NV * node).exp_()
        sums[node] = torch.stack([power_NV.sum(dim=-1), torch.linalg.vecdot(power_NV, delta_NV)], dim=-1)
        below = node
    return torch.stack([sums[node] for node in (1.0, *curve)], dim=1)


def complete(
    kept_NK: Tensor, reference_N: Tensor, sums_NJ2: Tensor, curve: Sequence[float] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N, K], log tail mass [N], entropy [N] and partition curve [N, 2J] from the kept logits.

    `sums_NJ2` is what `tail_sums` with this reference adds up to over all shards.
    """
    power_N, moment_N = sums_NJ2[:, 0].unbind(dim=-1)
    log_power_N = reference_N + power_N.log()
    log_partition_N = torch.logaddexp(kept_NK.logsumexp(dim=-1), log_power_N)
    logprobs_NK = kept_NK - log_partition_N[:, None]
    shift_N = reference_N - log_partition_N
    tail_entropy_N = -shift_N.exp() * (moment_N + shift_N * power_N)
    entropy_N = tail_entropy_N - (logprobs_NK.exp() * logprobs_NK).sum(dim=-1)
    powers_NJ, moments_NJ = sums_NJ2[:, 1:].unbind(dim=-1)
    values_NJ = shift_N[:, None] * shift_N.new_tensor(curve) + powers_NJ.log()
    curve_NJ = torch.cat([values_NJ, shift_N[:, None] + moments_NJ / powers_NJ], dim=-1)
    return logprobs_NK, log_power_N - log_partition_N, entropy_N, curve_NJ


def shorten(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    log_tail_N: Tensor,
    curve_NJ: Tensor,
    *,
    mass: float,
    floor: float,
    curve: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An adaptive selection: what `topk` keeps, up to the id with which the mass is reached or before the first below
    the floor; the rest goes back to the tail. Where no id is kept, the id is -1 and the log-probability -inf."""
    probs_NK = logprobs_NK.double().exp()
    dropped_NK = (probs_NK.cumsum(dim=-1) - probs_NK >= mass) | (probs_NK < floor)
    dropped_NK[:, 0] = False
    dropped_NK = dropped_NK.cummax(dim=-1).values
    back_NK = logprobs_NK.masked_fill(~dropped_NK, -torch.inf)
    weighed_NK = logprobs_NK.masked_fill(~dropped_NK, 0.0)
    values, slopes = [], []
    for index, node in enumerate(curve):
        value_N = torch.logaddexp(curve_NJ[:, index], (node * back_NK).logsumexp(dim=-1))
        slope_N = (curve_NJ[:, index] - value_N).exp() * curve_NJ[:, len(curve) + index]
        slopes.append(slope_N + ((node * back_NK - value_N[:, None]).exp() * weighed_NK).sum(dim=-1))
        values.append(value_N)
    return (
        ids_NK.masked_fill(dropped_NK, -1),
        logprobs_NK.masked_fill(dropped_NK, -torch.inf),
        torch.logaddexp(log_tail_N, back_NK.logsumexp(dim=-1)),
        torch.stack([*values, *slopes], dim=-1) if curve else curve_NJ,
    )


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
    """Positions [N, M], weights [N, M], sink [N], prompt mass [N] and entropy [N] of head-mean attention rows.

    Rows of the prompt may be given with the keys up to their own alone.
    """
    rows, seen = mean_NS.shape
    prompt_keys = pad(mean_NS[:, 1:prompt_length], (0, max(prompt_length - seen, 0)))
    positions_NM = mean_NS.new_full((rows, top_m), -1, dtype=torch.int32)
    weights_NM = mean_NS.new_zeros((rows, top_m))
    kept = min(top_m, prompt_keys.shape[1])
    # Keys that a row does not see all weigh 0: of these, those in front come first.
    behind_S = -torch.arange(prompt_keys.shape[1], dtype=mean_NS.dtype, device=mean_NS.device)
    ranked_NK, where_NK = torch.where(prompt_keys > 0, prompt_keys, behind_S).topk(kept, dim=-1)
    weights_NM[:, :kept] = ranked_NK.clamp(min=0)
    positions_NM[:, :kept] = where_NK.int() + 1
    entropy_N = torch.special.entr(mean_NS).sum(dim=-1)
    return positions_NM, weights_NM, mean_NS[:, 0], prompt_keys.sum(dim=-1), entropy_N
