"""Row losses that pull the student's distribution towards the teacher's cached one, p towards q below."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.distill.losses.rows import StudentRows, TeacherRows


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p/q) of each bucket; 0 where p = 0, whatever q is."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def tail_bucket_kl(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(p || q) over the K kept ids and one bucket of everything else.

    A lower bound of the KL over the whole vocabulary, by the log sum inequality, and equal to it at K = V - 1.
    """
    kept_NK = kl_terms(teacher.log_kept_NK, student.log_kept_NK)
    return kept_NK.sum(1) + kl_terms(teacher.log_rest_N, student.log_rest_N)


def topk_kl_renormalised(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(p' || q), p' being the kept probabilities scaled to sum to 1, so that the student learns an empty tail.

    Here for comparison: below K = 50 it is worse than the labels alone (Sparse Logit Sampling, 2503.16870).
    """
    log_p_NK = teacher.log_kept_NK.log_softmax(1)
    return kl_terms(log_p_NK, student.log_kept_NK).sum(1)
