"""How much of what whole distributions teach a cached signal teaches, and how sure that is.

    gain = (KL_CE - KL_x) / (KL_CE - KL_Full)

KL is the mean of KL(teacher || student) over the positions of held-back records and over seeds. 0: no better than the
labels alone; 1: as good as training on every probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
LABELS, WHOLE = "CE", "Full"
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Shares; `low` and `high` bound the middle 95 % of the resamples."""

    value: float
    low: float
    high: float


def gains(
    sums_by_setting: Mapping[str, Float64], positions_I: Float64, *, resamples: int = RESAMPLES
) -> dict[str, Gain]:
    """The gain of each setting from its sums of KL over the positions of each record, [seeds, records].

    The bootstrap draws seeds and records, each with replacement and the same for all settings (Efron 1979; two-way:
    Owen 2007): seeds and records on which everything is easy are easy for all. Raises ValueError where the sums are of
    different seeds or records.
    """
    shapes = {sums_SI.shape for sums_SI in sums_by_setting.values()}
    if len(shapes) > 1:
        raise ValueError(f"settings of different seeds or records: {sorted(shapes)}")
    (seeds, records) = shapes.pop()
    rng = np.random.default_rng(0)
    # How often each seed and each record was drawn says all: the drawn are only ever summed.
    drawn_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    drawn_RI = rng.multinomial(records, np.full(records, 1 / records), resamples)
    weighed_R = seeds * (drawn_RI @ positions_I)
    kl_R = {name: ((drawn_RS @ sums_SI) * drawn_RI).sum(1) / weighed_R for name, sums_SI in sums_by_setting.items()}
    kl = {name: sums_SI.mean(0).sum() / positions_I.sum() for name, sums_SI in sums_by_setting.items()}
    found = {}
    for name in sums_by_setting:
        low, high = np.quantile(_gain(kl_R[LABELS], kl_R[name], kl_R[WHOLE]), (0.025, 0.975))
        found[name] = Gain(value=float(_gain(kl[LABELS], kl[name], kl[WHOLE])), low=float(low), high=float(high))
    return found


def _gain(labels: Float64, reached: Float64, whole: Float64) -> Float64:
    return (labels - reached) / (labels - whole)
