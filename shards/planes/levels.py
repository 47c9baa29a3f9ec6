"""Probabilities as levels, spaced evenly in sqrt(p) where that matters.

An error d of sqrt(p) costs about 2 d^2 of KL whatever p is, so even spacing spends the bits where the KL needs them: k
entries in S steps cost about k / (6 S^2). Above root 192 / S steps are twice as wide, since no more than one or two
entries of a position lie there; below 3 / S they fall by a factor 0.55.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled

Float64 = NDArray[np.float64]

LEAST_STEPS, MOST_STEPS = 16, 284
"""Bounds of S: with the most, there are 254 levels."""
FACTOR, SMALL, EVEN_FROM, EVEN_TO = 0.55, 18, 3, 192
"""Levels below the even ones; first and last even root, in steps."""


class Levels:
    """The levels of S steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.roots = level_roots(steps)
        self.count = len(self.roots)
        self.logs = 2 * np.log(self.roots)
        self.masses = self.roots**2
        self.moments = self.masses * self.logs
        self.borders = np.concatenate([[0], (self.roots[1:] + self.roots[:-1]) / 2 * steps])
        """Where each level begins, in steps."""
        ends = (np.arange(32 * (steps + 2)) + 1) / 32
        self.highest = (np.searchsorted(self.borders, ends, side="left") - 1).astype(np.uint8)
        """The highest level of each 1/32 of a step."""


@compiled
def nearest_level(root: float, borders: Float64, highest: NDArray[np.uint8]) -> np.integer:
    """The level whose root is nearest, all in steps."""
    level = np.int64(highest[min(int(32 * root), len(highest) - 1)])
    while root < borders[level]:
        level -= 1
    return level


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
