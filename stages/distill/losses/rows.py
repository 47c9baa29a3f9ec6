"""What a loss sees of one response row: the ids that the teacher kept, all other ids as one bucket, and the label.

A row loss is a differentiable function of the student's log-probabilities of those buckets. Its gradient with respect
to all V logits follows from that with respect to K + 2 numbers (see `fused`), so a new loss is one function in
`losses/` and one row in `stages.distill.objective.LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """The cached side of N rows."""

    ids_NK: Tensor
    """int64, the kept ids by falling probability."""
    log_kept_NK: Tensor
    """True log-probabilities in nats, normalised over the whole vocabulary."""
    log_rest_N: Tensor
    """log of the mass of all ids that were not kept; -inf where nothing is left."""
    labels_N: Tensor
    """int64, the token that the record has at this position."""

    def rows(self, block: slice) -> TeacherRows:
        return TeacherRows(
            ids_NK=self.ids_NK[block],
            log_kept_NK=self.log_kept_NK[block],
            log_rest_N=self.log_rest_N[block],
            labels_N=self.labels_N[block],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRows:
    """The student's log-probabilities of the same buckets, normalised over the whole vocabulary."""

    log_kept_NK: Tensor
    log_rest_N: Tensor
    log_label_N: Tensor


RowLoss = Callable[[StudentRows, TeacherRows], Tensor]
"""Value of each row in nats, [N]."""
