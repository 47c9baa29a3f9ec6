"""What changes while a run goes on, as pure functions of the step: nothing here has a state to save."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, *, warmup: float, final: float) -> float:
    """Share of the peak rate for 0-based `step` of `total`: a linear rise over `warmup` of all steps, then a cosine.

    The first step already learns; the last one has come down to `final`.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - 1 - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def attention_factor(step: int, total: int) -> float:
    """Share of the attention term's weight: 1 at the start, linearly down to 0 at half of the run."""
    return max(0.0, 1 - 2 * step / total)


def weight_factor(step: int, total: int, *, final: float, shape: str) -> float:
    """Share of a term's weight: 1 at the first step, `final` at the last, along a "linear" or "cosine" path."""
    progress = step / max(1, total - 1)
    if shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1 + (final - 1) * progress
