"""What a codec of any version may lose, measured in one way."""

from __future__ import annotations

from typing import Any

import numpy as np

from shards.record import Record


def bucket_kl(record: Record, decoded: Any) -> np.ndarray:
    """KL(teacher || decoded) over the k ids and the tail, in float64, each side normalised over them."""
    sides = []
    for side in (record, decoded):
        order = np.argsort(side.ids_NK, axis=1)
        kept = np.take_along_axis(side.logprobs_NK.astype(np.float64), order, 1)
        logs = np.concatenate([kept, side.log_tail_N.astype(np.float64)[:, None]], axis=1)
        sides.append(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
    truth, guess = sides
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(truth), 0, np.exp(truth) * (truth - guess)).sum(axis=1)
