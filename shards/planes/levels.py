"""Probabilities as levels, spaced evenly in sqrt(p) where that matters.

An error d of sqrt(p) costs about 2 d^2 of KL whatever p is, so even spacing spends the bits where the KL needs them: k
entries in S steps cost about k / (6 S^2). Above root 192 / S steps are twice as wide, since no more than one or two
entries of a position lie there; below 3 / S they fall by a factor 0.55.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

LEAST_STEPS, MOST_STEPS = 16, 284
"""Bounds of S: with the most, there are 254 levels."""
FACTOR, SMALL, EVEN_FROM, EVEN_TO = 0.55, 18, 3, 192
"""Levels below the even ones; first and last even root, in steps."""
ABSENT = 255
"""Stands where there is no entry."""


class Levels:
    """The levels of S steps, and tables of 256 by level in which absent ones come to nothing."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.roots = level_roots(steps)
        self.count = len(self.roots)
        self.logs = 2 * np.log(self.roots)
        absent = np.zeros(256 - self.count)
        self.masses = np.concatenate([self.roots**2, absent])
        self.moments = np.concatenate([self.roots**2 * self.logs, absent])
        self.falling_keys = (self.count - 1 - np.arange(256) & 0xFF).astype(np.uint32) << 24
        """For sorting: the distance from the highest level, in the top byte."""
        self.falling_logs = np.concatenate([self.logs[::-1], absent - np.inf])
        self._borders = (self.roots[1:] + self.roots[:-1]) / 2

    def nearest(self, logprobs: Float64) -> NDArray[np.uint32]:
        """The level whose root is nearest to sqrt(p)."""
        steps = self.steps * np.exp(logprobs / 2)
        levels: NDArray[np.uint32] = (np.maximum(np.rint(steps), EVEN_FROM) + (SMALL - EVEN_FROM)).astype(np.uint32)
        odd = (steps < EVEN_FROM) | (steps > min(EVEN_TO, self.steps))
        levels[odd] = np.searchsorted(self._borders, steps[odd] / self.steps)
        return levels


def level_roots(steps: int) -> Float64:
    """sqrt(p) of every level, rising to 1, or to 1 + 1 / S where S - 192 is odd."""
    small = EVEN_FROM * FACTOR ** np.arange(SMALL, 0, -1)
    even = np.arange(EVEN_FROM, min(EVEN_TO, steps) + 1)
    roots: Float64 = np.concatenate([small, even, np.arange(EVEN_TO + 2, steps + 2, 2)]) / steps
    return roots


def steps_for(k: float, kl: float = 1.57e-4) -> int:
    """The S at which k entries a position cost this much KL, within its bounds."""
    return int(np.clip(np.rint(np.sqrt(k / (6 * kl))), LEAST_STEPS, MOST_STEPS))


@lru_cache(maxsize=16)
def levels_of(steps: int) -> Levels:
    return Levels(steps)
