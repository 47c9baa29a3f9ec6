"""Samples of random ids, for teachers of which nothing but their arithmetic is asked."""

from __future__ import annotations

import numpy as np

from stages.corpus.sample import Sample


def random_samples(*lengths: tuple[int, int], seed: int) -> list[Sample]:
    """One for each (prompt, response) length, of ids below 1,000."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            sample_id=f"{number:016x}",
            prompt_ids=rng.integers(0, 1_000, prompt).astype(np.int32),
            response_ids=rng.integers(0, 1_000, response).astype(np.int32),
        )
        for number, (prompt, response) in enumerate(lengths)
    ]
