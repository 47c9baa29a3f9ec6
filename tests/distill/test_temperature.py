"""Dynamic temperature: the schedule, the formula, and statistics that no rank or micro-batch can change."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.distill.settings import TEMPERATURE_MODES, ObjectiveSettings
from stages.distill.temperature import BINS, SCORES, Difficulty, base_temperature, count_scores, row_temperatures


def test_modes_are_those_of_the_settings() -> None:
    assert set(SCORES) < set(TEMPERATURE_MODES)
    with pytest.raises(ValueError, match="temperature_mode must be one of fixed, schedule, entropy, adaptive"):
        ObjectiveSettings(temperature_mode="warm")
    with pytest.raises(ValueError, match="lie between 1 and objective"):
        ObjectiveSettings(temperature=1.6)
    assert ObjectiveSettings(temperature=1.6, temperature_cap=2.0).tempers
    assert not ObjectiveSettings(temperature_mode="schedule").tempers


def test_the_base_stays_or_falls_along_a_cosine_to_one() -> None:
    fixed = ObjectiveSettings(temperature=1.4)
    assert {base_temperature(fixed, step, 10) for step in range(10)} == {1.4}
    for mode in ("schedule", *SCORES):
        falling = [
            base_temperature(ObjectiveSettings(temperature=1.4, temperature_mode=mode), s, 11) for s in range(11)
        ]
        assert falling[0] == 1.4
        assert falling[5] == pytest.approx(1.2)
        assert falling[-1] == pytest.approx(1.0)
        assert all(later < earlier for earlier, later in pairwise(falling))
    assert base_temperature(ObjectiveSettings(temperature=1.4, temperature_mode="schedule"), 0, 1) == 1.4


def test_hard_rows_are_compared_sharper_and_none_beyond_the_bounds() -> None:
    scores = torch.linspace(0, 1, 101)
    difficulty = Difficulty(median=0.3, spread=0.1)
    found = row_temperatures(scores, 1.2, difficulty, contrast=0.1, cap=1.5)
    want = [1.2 * math.exp(-0.1 * math.tanh((s - 0.3) / 0.1)) for s in scores.tolist()]
    assert found.tolist() == pytest.approx(want, rel=1e-6)
    assert all(later <= earlier for earlier, later in pairwise(found.tolist()))
    wild = row_temperatures(scores, 1.2, difficulty, contrast=3.0, cap=1.5)
    assert (wild.min(), wild.max()) == (1.0, 1.5)
    assert (row_temperatures(scores, 1.2, None, contrast=3.0, cap=1.5) == torch.tensor(1.2)).all()
    alike = row_temperatures(scores, 1.2, Difficulty(median=0.3, spread=0.0), contrast=0.1, cap=1.5)
    assert alike.isfinite().all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.integers(0, 79))
def test_median_and_spread_come_from_counts_however_they_are_split(scores: list[float], cut: int) -> None:
    whole = torch.tensor(scores, dtype=torch.float64)
    counts = count_scores(whole[:cut]).sum(0) + count_scores(whole[cut:]).sum(0)
    found = Difficulty.of(counts)
    assert found == Difficulty.of(count_scores(whole).sum(0))
    assert found is not None
    lower = sorted(scores)[(len(scores) - 1) // 2]
    assert found.median == pytest.approx(lower, abs=0.51 / BINS)
    distances = sorted(abs(score - found.median) for score in scores)
    assert found.spread == pytest.approx(distances[(len(scores) - 1) // 2], abs=1.01 / BINS)


def test_nothing_counted_is_no_difficulty() -> None:
    assert Difficulty.of(torch.zeros(BINS)) is None
    assert Difficulty.of(torch.zeros(0)) is None
