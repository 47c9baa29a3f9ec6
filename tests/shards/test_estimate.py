"""An estimate of a set from few of its records: right on average, and its interval holds as often as it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.errors import InvalidRequest
from shards.estimate import estimate_size, extrapolate
from shards.manifest import read_manifest


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """A population whose bytes follow positions with noise of its own and an overhead a record."""
    rng = np.random.default_rng(5)
    positions_R = rng.lognormal(5, 0.8, 20_000).round() + 1
    bytes_R = positions_R * rng.normal(110, 12, 20_000) + 150
    planned, truth = int(positions_R.sum()), bytes_R.sum()
    held, centres = 0, []
    for _ in range(500):
        chosen = rng.choice(20_000, 48, replace=False)
        found = extrapolate(bytes_R[chosen], positions_R[chosen], planned)
        held += abs(found.bytes - truth) <= found.margin
        centres.append(found.bytes)
        assert found.margin < 0.1 * found.bytes
    assert 0.91 <= held / 500 <= 0.98
    assert np.mean(centres) == pytest.approx(truth, rel=0.005)


def test_a_set_extrapolated_to_itself_is_itself(folder: Path) -> None:
    totals = read_manifest(folder).totals()
    found = estimate_size(folder, totals["positions"])
    assert found.bytes == pytest.approx(totals["bytes"])
    assert (found.sampled, found.positions) == (8, totals["positions"])
    assert estimate_size(folder, 10 * totals["positions"]).bytes == pytest.approx(10 * totals["bytes"])


def test_too_little_is_refused() -> None:
    one = np.ones(1)
    with pytest.raises(InvalidRequest, match="two records"):
        extrapolate(one, one, 10)
    with pytest.raises(InvalidRequest, match="a planned position"):
        extrapolate(np.ones(2), np.ones(2), 0)
