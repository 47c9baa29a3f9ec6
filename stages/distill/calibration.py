"""Expected calibration error (Naeini et al. 2015), from a table that adds up over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

CALIBRATION_BINS = 15


def calibration_table(confidence_N: Tensor, hit_N: Tensor) -> Tensor:
    """By bin of confidence, [C, 3]: predictions, their confidence and their hits, each summed."""
    bins_N = (confidence_N * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    values_N3 = torch.stack([torch.ones_like(confidence_N), confidence_N, hit_N.to(confidence_N.dtype)], 1)
    return values_N3.new_zeros(CALIBRATION_BINS, 3).index_add_(0, bins_N, values_N3)


def calibration_error(table_C3: Tensor) -> float:
    """|confidence - accuracy| over the bins, weighted by their predictions."""
    count_C, confidence_C, hits_C = table_C3.unbind(1)
    return float((confidence_C - hits_C).abs().sum() / count_C.sum())
