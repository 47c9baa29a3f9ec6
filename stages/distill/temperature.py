"""Dynamic temperature: at which T each row is compared, from the step and from how hard the row is.

    T_t = clip(T_b exp(-c tanh((s_t - median) / MAD)), 1, cap)

The base T_b is constant (`fixed`), or falls along a cosine to 1 at the last step. The score s_t in [0, 1] is the
teacher's entropy over log V (`entropy`), or the Hellinger distance between student and teacher (`adaptive`; AdaKD,
2510.11615): hard rows are compared sharper, easy ones softer. Median and MAD are those of the global batch one step
before, taken from counts, so that T depends on no micro-batch and no rank, and one pass over the logits is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.distill.losses.divergences import hellinger
from stages.distill.losses.rows import StudentRows, TeacherRows
from stages.distill.settings import ObjectiveSettings

BINS = 256
"""Of the histogram of scores over [0, 1]."""

Score = Callable[[StudentRows, TeacherRows, int], Tensor]


def _entropy_score(_: StudentRows, teacher: TeacherRows, vocab_size: int) -> Tensor:
    return (teacher.entropy_N / math.log(vocab_size)).clamp(0.0, 1.0)


def _hellinger_score(student: StudentRows, teacher: TeacherRows, _: int) -> Tensor:
    return hellinger(student, teacher)


SCORES: dict[str, Score] = {"entropy": _entropy_score, "adaptive": _hellinger_score}
"""The modes in which every row has a temperature of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """Of the scores of one global batch."""

    median: float
    spread: float
    """Median distance from the median."""

    @classmethod
    def of(cls, counts: Tensor) -> Difficulty | None:
        """From `count_scores` added up over the batch; None where nothing was counted."""
        if not counts.numel() or not counts.sum():
            return None
        counts = counts.double().cpu()
        middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        median = _weighted_median(middle, counts)
        return cls(median=median, spread=_weighted_median((middle - median).abs(), counts))


def _weighted_median(values: Tensor, counts: Tensor) -> float:
    order = values.argsort(stable=True)
    reached = counts[order].cumsum(0) * 2 >= counts.sum()
    return values[order][reached][0].item()


def count_scores(scores_N: Tensor) -> Tensor:
    """[N, BINS], one at each row's bin."""
    bins_N = (scores_N * BINS).long().clamp(0, BINS - 1)
    return torch.nn.functional.one_hot(bins_N, BINS)


def base_temperature(settings: ObjectiveSettings, step: int, total: int) -> float:
    """T_b at 0-based `step` of `total`."""
    if settings.temperature_mode == "fixed":
        return settings.temperature
    fall = 0.5 * (1 + math.cos(math.pi * step / max(1, total - 1)))
    return 1 + (settings.temperature - 1) * fall


def row_temperatures(
    scores_N: Tensor, base: float, difficulty: Difficulty | None, *, contrast: float, cap: float
) -> Tensor:
    """T of each row; before the first batch has been measured, the base for all."""
    log_t_N = torch.zeros_like(scores_N)
    if difficulty is not None:
        # Half a bin is as near as counts can tell scores apart.
        log_t_N = -contrast * torch.tanh((scores_N - difficulty.median) / max(difficulty.spread, 0.5 / BINS))
    return (base * log_t_N.exp()).clamp(1.0, cap)
