"""How the next token is drawn. Random numbers come from generators of our own, one a prompt.

A draw is the argmax of log-probabilities plus Gumbel noise, which is a sample from their softmax (Gumbel, 1954), so
transformers' greedy search does the drawing and no global random state is read or moved. What a prompt draws depends
on its seed alone, not on the prompts beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Raises ValueError for values that mean nothing."""

    max_new_tokens: int = 160
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this mass."""
    seed: int = 0
    """Prompt n of a call draws with seed + n."""
    stop: tuple[str, ...] = ()
    """An answer ends before any of these."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or a finite number above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0, not {self.seed}")
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")


class GumbelDraw(LogitsProcessor):
    """Turns scores [B, V] into ones whose argmax is a draw at the temperature, within top_p."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_BV = scores.float()
        # The best score becomes 0, so that the division cannot overflow upwards however low the temperature is.
        scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / self._temperature
        if self._nucleus is not None:
            scores_BV = self._nucleus(input_ids, scores_BV)
        noise_BV = torch.stack([self._gumbel(scores_BV.shape[-1], generator) for generator in self._generators])
        drawn_BV: Tensor = scores_BV + noise_BV.to(scores_BV.device)
        return drawn_BV

    @staticmethod
    def _gumbel(width: int, generator: torch.Generator) -> Tensor:
        exponential_V = torch.empty(width).exponential_(generator=generator)
        return -exponential_V.clamp_min(torch.finfo(torch.float32).tiny).log()
