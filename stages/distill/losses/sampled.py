"""Unbiased estimates from ids that were drawn from the teacher (Sparse Logit Sampling, 2503.16870)."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.distill.losses.rows import StudentRows, TeacherRows


def sampled_kl(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """Cross-entropy of the estimated target minus the teacher's entropy.

    The target t gives an exact id its probability and a drawn one its part of the draws times the mass that they were
    drawn from. Over draws E[t] = p, so this is an unbiased estimate of KL(p || q), and its gradient (sum t) q - t one
    of the KL's. One row's value may be negative.
    """
    share_NK = teacher.log_share_NK.exp()
    terms_NK = torch.where(teacher.present_NK, share_NK * student.log_kept_NK, 0.0)
    return -terms_NK.sum(1) - teacher.entropy_N
