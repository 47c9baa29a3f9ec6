"""What can be set about answers: how their tokens are drawn, and which of them a run shows at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

MAX_LOGPROBS = 20
SEEDS = 2**63
"""As many as a generator tells apart."""


class SamplingOptions(TypedDict, total=False):
    """How answers are drawn, as keyword arguments; the fields of `Sampling` say what each means."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Raises ValueError for values that mean nothing."""

    max_new_tokens: int = 160
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this mass."""
    seed: int = 0
    """Answer n of a call draws with seed + n."""
    stop: Sequence[str] = ()
    """An answer ends before any of these; a text alone is one of them."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many most probable tokens beside it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or a finite number above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be a whole number from 0 and below 2^63, not {self.seed}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(self.stop):
            raise ValueError("a stop string must not be empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must lie in [0, {MAX_LOGPROBS}], not {self.logprobs}")

    def of_answer(self, index: int) -> Sampling:
        """As the answer of this index draws; after the last seed comes the first."""
        return replace(self, seed=(self.seed + index) % SEEDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    prompts: int = 3
    """Validation prompts answered at the end of a run."""
    checked: int = 200
    """Validation prompts whose answers are compared with the label, at most, where the data has a checker."""
    max_new_tokens: int = 160
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "checked"):
            if getattr(self, name) < 0:
                raise ValueError(f"generation.{name} must not be negative")
        try:
            Sampling(**self.sampling())
        except ValueError as error:
            raise ValueError(f"generation.{error}") from error

    def sampling(self) -> SamplingOptions:
        """How the answers are drawn."""
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
