"""The water-filled tail: dynamic mining of hard negatives among the ids that the teacher did not keep.

Every unseen probability lies between 0 and kappa, the smallest kept one, and all of them sum to the tail's mass rho.
Of all such tails the one nearest to the student's q is p*_j = min(kappa, c q_j), c making the sum right. KL(p* || q)
is thus the largest lower bound of the whole KL that an exact top-k permits. A hard negative is an id at which p* hits
kappa: the student scores it above anything that the teacher can have meant, and dL/dz = q - p* pushes it down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.distill.losses.divergences import kl_terms
from stages.distill.losses.rows import Rows, StudentRows, TeacherRows


def water_filled_kl(student: StudentRows, teacher: TeacherRows) -> Tensor:
    """KL(p* || q) with at most M hard negatives, M being as many ids as `student.log_hard_NM` shows.

    With fewer than the true number of them it is a lower bound still; with none it is `tail_bucket_kl`.
    """
    log_kappa_N, hard_NM = _hard(student, teacher)
    kappa_N = log_kappa_N.exp()
    left_N = teacher.log_rest_N.exp() - kappa_N * hard_NM.sum(1)
    others_NM = student.log_hard_NM.masked_fill(hard_NM, -torch.inf)
    log_q_left_N = torch.cat([others_NM, student.log_easy_N[:, None]], 1).logsumexp(1)
    kept_N = kl_terms(teacher.log_kept_NK, student.log_kept_NK).sum(1)
    negatives_NM = torch.where(hard_NM, kappa_N[:, None] * (log_kappa_N[:, None] - student.log_hard_NM), 0.0)
    return kept_N + negatives_NM.sum(1) + kl_terms(left_N.clamp_min(0.0).log(), log_q_left_N)


def hard_share(rows: Rows) -> Tensor:
    """1 at a position with hard negatives, else 0."""
    return _tempered_hard(rows).any(1).to(rows.temperature_N.dtype)


def hard_mass(rows: Rows) -> Tensor:
    """The student's probability of a position's hard negatives."""
    return torch.where(_tempered_hard(rows), rows.tempered_student.log_hard_NM.detach().exp(), 0.0).sum(1)


def _tempered_hard(rows: Rows) -> Tensor:
    return _hard(rows.tempered_student, rows.tempered_teacher)[1]


@torch.no_grad()
def _hard(student: StudentRows, teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """log kappa [N], and which of the student's M best are hard negatives [N, M]: always the first h of them.

    h is the smallest with (rho - h kappa) q_(h+1) <= kappa (Q - q_1 - ... - q_h): the level c kappa^-1 of what is left
    then lifts no further id above kappa. While that fails rho > (h + 1) kappa, so the rest never gets a negative mass.
    """
    log_kappa_N = teacher.log_kept_NK.masked_fill(~teacher.present_NK, torch.inf).amin(1)
    kappa_N1, rho_N1 = log_kappa_N.exp()[:, None], teacher.log_rest_N.exp()[:, None]
    q_NM = student.log_hard_NM.exp()
    from_here_NM = q_NM.flip(1).cumsum(1).flip(1) + student.log_easy_N.exp()[:, None]
    count_M = torch.arange(q_NM.shape[1], device=q_NM.device)
    too_high_NM = (rho_N1 - count_M * kappa_N1) * q_NM > kappa_N1 * from_here_NM
    return log_kappa_N, too_high_NM.cumprod(1).bool()
