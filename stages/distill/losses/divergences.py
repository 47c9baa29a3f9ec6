"""Distances between the teacher's distribution p and the student's q over the kept ids and one bucket of all others.

Merging ids into one bucket can only lessen a divergence (the data-processing inequality): each of `tail_bucket_kl`,
`reverse_kl`, `jensen_shannon` and `total_variation` is a lower bound of its namesake over the whole vocabulary, and
equal to it where all ids but one are kept. So it is for any choice of the kept ids, drawn ones too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.distill.losses.rows import Rows, StudentRows, TeacherRows

LEAST_LOG_P = -30.0
"""What `reverse_kl` takes for the logarithm of a probability that the cache has as 0."""


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p/q) of each bucket; 0 where p = 0, whatever q is."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def tail_bucket_kl(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(p || q). The ghost token of Sparse Logit Sampling (2503.16870) at temperature 1."""
    kept_NK = kl_terms(teacher.log_kept_NK, student.log_kept_NK)
    return kept_NK.sum(1) + kl_terms(teacher.log_rest_N, student.log_rest_N)


def reverse_kl(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(q || p), which seeks modes (MiniLLM, 2306.08543)."""
    log_p_NJ, log_q_NJ, present_NJ = _buckets(student, teacher)
    terms_NJ = log_q_NJ.exp() * (log_q_NJ - log_p_NJ.clamp_min(LEAST_LOG_P))
    return torch.where(present_NJ, terms_NJ, 0.0).sum(1)


def jensen_shannon(student: StudentRows, teacher: TeacherRows, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (GKD, 2306.13649)."""
    log_p_NJ, log_q_NJ, present_NJ = _buckets(student, teacher)
    log_m_NJ = torch.logaddexp(log_p_NJ + math.log(beta), log_q_NJ + math.log1p(-beta))
    terms_NJ = beta * kl_terms(log_p_NJ, log_m_NJ) + (1 - beta) * log_q_NJ.exp() * (log_q_NJ - log_m_NJ)
    return torch.where(present_NJ, terms_NJ, 0.0).sum(1)


def total_variation(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]."""
    log_p_NJ, log_q_NJ, present_NJ = _buckets(student, teacher)
    return 0.5 * torch.where(present_NJ, (log_p_NJ.exp() - log_q_NJ.exp()).abs(), 0.0).sum(1)


def hellinger(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """sqrt(1 - sum sqrt(p q)), in [0, 1]."""
    log_p_NJ, log_q_NJ, present_NJ = _buckets(student, teacher)
    overlap_N = torch.where(present_NJ, (0.5 * (log_p_NJ + log_q_NJ)).exp(), 0.0).sum(1)
    return (1 - overlap_N).clamp(0.0, 1.0).sqrt()


def residual_to_label(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(t || q), t being p on the kept ids and the rest's mass on the label (Sparse Logit Sampling's naive fix)."""
    log_p_NK, log_rest_N = teacher.log_kept_NK, teacher.log_rest_N
    value_N = kl_terms(log_p_NK, student.log_kept_NK).sum(1) + kl_terms(log_rest_N, student.log_label_N)
    # At a label that was kept, t is the sum of two masses: its entropy is not theirs.
    is_label_NK = (teacher.ids_NK == teacher.labels_N[:, None]) & teacher.present_NK
    log_t_NK = torch.logaddexp(log_p_NK, log_rest_N[:, None])
    merged_NK = _entropy_terms(log_p_NK) + _entropy_terms(log_rest_N)[:, None] - _entropy_terms(log_t_NK)
    return value_N + torch.where(is_label_NK, merged_NK, 0.0).sum(1)


def topk_kl_renormalised(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(p' || q), p' being the kept probabilities scaled to sum to 1, so that the student learns an empty tail.

    Here for comparison: below K = 50 it is worse than the labels alone (Sparse Logit Sampling, 2503.16870).
    """
    return kl_terms(teacher.log_kept_NK.log_softmax(1), student.log_kept_NK).sum(1)


def ghost_kl(rows: Rows) -> Tensor:
    """T^2 KL over the K + 1 buckets, each side sharpened or flattened as if the rest were one token: b^(1/T) / sum.

    `tail_bucket_kl` where T = 1. It needs no partition curve, and pays for it: at T > 1 thousands of unlikely ids gain
    far more mass than one token in their place.
    """
    log_p_NJ, log_q_NJ, present_NJ = _buckets(rows.student, rows.teacher)
    scale_N1 = rows.temperature_N[:, None]
    log_p_NJ = (log_p_NJ / scale_N1).log_softmax(1)
    log_q_NJ = (log_q_NJ.masked_fill(~present_NJ, -torch.inf) / scale_N1).log_softmax(1)
    return rows.temperature_N.square() * kl_terms(log_p_NJ, torch.where(present_NJ, log_q_NJ, 0.0)).sum(1)


def conditional_kl(rows: Rows) -> Tensor:
    """KL of the masses (P, 1 - P) of kept ids and rest at temperature 1, plus P T^2 KL(p_T(.|kept) || q_T(.|kept)).

    By the chain rule `tail_bucket_kl` where T = 1. Only what is known of the head is tempered: no curve is needed.
    """
    absent_NK = ~rows.teacher.present_NK
    log_p_NK = rows.teacher.log_kept_NK
    log_q_NK = rows.student.log_kept_NK.masked_fill(absent_NK, -torch.inf)
    log_head_N, scale_N1 = log_p_NK.logsumexp(1), rows.temperature_N[:, None]
    masses_N = kl_terms(log_head_N, log_q_NK.logsumexp(1)) + kl_terms(rows.teacher.log_rest_N, rows.student.log_rest_N)
    within_q_NK = (log_q_NK / scale_N1).log_softmax(1).masked_fill(absent_NK, 0.0)
    within_N = kl_terms((log_p_NK / scale_N1).log_softmax(1), within_q_NK).sum(1)
    return masses_N + log_head_N.exp() * rows.temperature_N.square() * within_N


def _buckets(student: StudentRows, teacher: TeacherRows) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and which are there, over the kept ids and the rest: [N, K + 1] each."""
    log_p_NJ = torch.cat([teacher.log_kept_NK, teacher.log_rest_N[:, None]], 1)
    log_q_NJ = torch.cat([student.log_kept_NK, student.log_rest_N[:, None]], 1)
    present_NJ = torch.cat([teacher.present_NK, torch.ones_like(teacher.present_NK[:, :1])], 1)
    return log_p_NJ, log_q_NJ, present_NJ


def _entropy_terms(log_p: Tensor) -> Tensor:
    """-p log p; 0 where p = 0."""
    terms: Tensor = torch.special.entr(log_p.exp())
    return terms
