"""What can be set about the corpus."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    source: str = ""
    """A JSONL file, or "demo:NAME" for a text that the demo knows how to make."""
    train_size: int = 20_000
    val_size: int = 2_000
    min_score: float | None = None
    """Rows that carry a `score` below this are dropped; rows without a score are kept."""
    max_prompt_tokens: int = 1_024
    """Longer prompts are dropped: cutting a question changes what is asked."""
    max_response_tokens: int = 1_024
    """Longer responses are cut, and then end without the end token."""
    thinking: bool = True
    """Keep the reasoning: in the template's own form where it has one, else as text before the answer."""
    seed: int = 0
    """Decides which rows become train and which validation."""

    def __post_init__(self) -> None:
        for name in ("train_size", "val_size", "max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"corpus.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"corpus.seed must be a whole number from 0, not {self.seed}")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"corpus.min_score must be finite, not {self.min_score}")

    def deciding(self) -> dict[str, Any]:
        """All that decides the outcome beside the source's bytes; where the source lies does not."""
        values = dataclasses.asdict(self)
        del values["source"]
        return values
