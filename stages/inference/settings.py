"""What can be set about the generations a run shows at its end."""

from __future__ import annotations

from dataclasses import dataclass


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
        if self.prompts < 0 or self.checked < 0 or self.max_new_tokens < 1:
            raise ValueError("generation: prompts >= 0, checked >= 0, max_new_tokens >= 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("generation: temperature >= 0, 0 < top_p <= 1")
        if self.seed < 0:
            raise ValueError(f"generation.seed must be a whole number from 0, not {self.seed}")
