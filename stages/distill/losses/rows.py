"""What a loss sees of one response row: the ids that the teacher kept, all other ids as one bucket, and the label.

A row loss is a differentiable function of the student's log-probabilities of those buckets. Its gradient with respect
to all V logits follows from that with respect to a few numbers a row (see `fused`), so a new loss is one function in
`losses/` and one row in `stages.distill.losses.table.LOSSES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """The cached side of N rows; log-probabilities in nats, at whatever temperature."""

    ids_NK: Tensor
    """int64, the kept ids. A row with fewer than K repeats its first one, absent by `present_NK`."""
    present_NK: Tensor
    """bool: an id was kept here."""
    exact_NK: Tensor
    """bool: it was kept for being among the most probable, not drawn."""
    log_kept_NK: Tensor
    """Log-probabilities, normalised over the whole vocabulary; -inf where absent, NaN where the set keeps none."""
    log_share_NK: Tensor
    """log of what an unbiased target gives each id: an exact one its probability, a drawn one its part of the draws
    times the mass that they were drawn from; -inf where absent."""
    log_rest_N: Tensor
    """log of the mass of all ids that were not kept; -inf where nothing is left, NaN where it is not known."""
    log_tail_N: Tensor
    """log of the mass of all ids but the exact ones: of what draws were made from."""
    entropy_N: Tensor
    """Of the whole distribution, in nats."""
    curve_NJ: Tensor | None
    """The tail's partition curve as in `shards.record.Record`; None where the set has none."""
    labels_N: Tensor
    """int64, the token that the record has at this position."""

    def rows(self, block: slice) -> TeacherRows:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return dataclasses.replace(self, **{name: value[block] for name, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRows:
    """The student's log-probabilities of the same buckets, normalised over the whole vocabulary."""

    log_kept_NK: Tensor
    """Where the teacher's id is absent, a finite number without meaning."""
    log_hard_NM: Tensor
    """The most probable ids outside the kept ones, falling; M = 0 unless a loss looks at them."""
    log_rest_N: Tensor
    """Everything that was not kept, `log_hard_NM` included."""
    log_easy_N: Tensor
    """Everything that was not kept, `log_hard_NM` excluded."""
    log_label_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """N rows as a loss gets them: at temperature 1, and at the temperature of each row."""

    student: StudentRows
    teacher: TeacherRows
    temperature_N: Tensor
    tempered_student: StudentRows
    """softmax(logits / temperature); `student` itself where nothing is tempered."""
    tempered_teacher: TeacherRows


RowLoss = Callable[[Rows], Tensor]
"""Value of each row in nats, [N]; or several numbers a row, [N, C]."""
PairLoss = Callable[[StudentRows, TeacherRows], Tensor]
"""Value of each row between two sides at the same temperature."""


def plain(loss: PairLoss) -> RowLoss:
    """A loss at temperature 1."""
    return lambda rows: loss(rows.student, rows.teacher)


def tempered(loss: PairLoss) -> RowLoss:
    """T^2 L(p_T, q_T), T being a constant of the row, so that dL/dz = T (q_T - p_T) for a KL (Hinton et al., 2015)."""
    return lambda rows: rows.temperature_N.square() * loss(rows.tempered_student, rows.tempered_teacher)


def where_unsure(loss: RowLoss, least: float) -> RowLoss:
    """The loss where the teacher's entropy is `least` nats or more, 0 elsewhere."""
    return lambda rows: torch.where(rows.teacher.entropy_N >= least, loss(rows), 0.0)


def log_difference(log_whole: Tensor, log_part: Tensor) -> Tensor:
    """log(whole - part); -inf where rounding leaves nothing of the whole."""
    log_ratio = (log_part - log_whole).clamp_max(0.0).masked_fill(torch.isneginf(log_whole), -torch.inf)
    return log_whole + torch.log1p(-log_ratio.exp())
