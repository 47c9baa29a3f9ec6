"""Attention matching: where the student looks in the prompt against where the teacher looked.

Both sides are means over heads, over the prompt keys 1..P-1. Key 0 is left out on both: the teacher parks attention
there that it has no use for (its sink), the student need not. The keys that the teacher did not keep form one bucket.
Rows that predict the response teach the decoder's cross-attention, rows of the prompt the encoder's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.distill.losses.divergences import kl_terms


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAttention:
    """The cached attention of N rows in L teacher layers, M prompt keys each."""

    positions_LNM: Tensor
    """int64, in 1..P-1; -1 where the prompt has fewer keys."""
    weights_LNM: Tensor
    """0 where the position is -1."""
    prompt_LN: Tensor
    """Weight of all prompt keys 1..P-1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderAttention:
    """The cached attention of N rows of prompts."""

    teacher: TeacherAttention
    rows_N: Tensor
    """int64, index into the flattened [B * P] encoder rows."""
    queries_N: Tensor
    """int64, the prompt position t of the row: the teacher, being causal, saw the keys up to t and no more."""
    weights_N: Tensor
    """Predicted positions of the row's record over its rows here: a sum of these is the record's positions."""


def student_layers(teacher_layers: int, layers: int) -> list[int]:
    """The student's layer that each summarised teacher layer teaches: at the same share of depth, the last the last."""
    return [-(-(index + 1) * layers // teacher_layers) - 1 for index in range(teacher_layers)]


def attention_kl(student_LNP: Sequence[Tensor], teacher: TeacherAttention) -> Tensor:
    """Sum over rows, mean over layers, of the bucketed KL times the teacher's prompt mass; nats.

    `student_LNP` holds for each summarised teacher layer the head-mean attention of the decoder layer it teaches. Rows
    that pay the prompt little heed weigh little, and rows of a one-token prompt nothing.
    """
    return _rows(student_LNP, teacher).sum()


def encoder_attention_kl(student_LNP: Sequence[Tensor], prompt: EncoderAttention) -> Tensor:
    """The same between rows of the prompt and the encoder's attention over the keys up to the row itself.

    It is the mean over each record's rows, times its predicted positions: like every other term, it is then averaged
    over the positions of the global batch.
    """
    keys_P = torch.arange(student_LNP[0].shape[1], device=prompt.queries_N.device)
    later_NP = keys_P > prompt.queries_N[:, None]
    causal = [layer_NP.float().masked_fill(later_NP, 0.0) for layer_NP in student_LNP]
    return (prompt.weights_N * _rows(causal, prompt.teacher)).sum()


def _rows(student_LNP: Sequence[Tensor], teacher: TeacherAttention) -> Tensor:
    """[N], the mean over layers."""
    return torch.stack([_layer(rows.float(), teacher, layer) for layer, rows in enumerate(student_LNP)]).mean(0)


def _layer(student_NP: Tensor, teacher: TeacherAttention, layer: int) -> Tensor:
    positions_NM, weights_NM = teacher.positions_LNM[layer], teacher.weights_LNM[layer]
    prompt_N = teacher.prompt_LN[layer]
    tiny = torch.finfo(student_NP.dtype).tiny
    present_NM = positions_NM > 0
    keys_NM = positions_NM.clamp_min(0)
    outside_NP = student_NP.scatter(1, keys_NM, 0.0).index_fill(1, keys_NM.new_zeros(1), 0.0)
    kept_NM = torch.where(present_NM, student_NP.gather(1, keys_NM), 0.0)
    rest_N1 = outside_NP.sum(1, keepdim=True)
    student_NJ = torch.cat([kept_NM, rest_N1], 1).clamp_min(tiny)
    rest_N = (prompt_N - weights_NM.sum(1)).clamp_min(0.0)
    teacher_NJ = torch.cat([weights_NM, rest_N[:, None]], 1)
    total_N1 = teacher_NJ.sum(1, keepdim=True).clamp_min(tiny)
    log_q_NJ = student_NJ.log() - student_NJ.sum(1, keepdim=True).log()
    return prompt_N * kl_terms((teacher_NJ / total_N1).log(), log_q_NJ).sum(1)
