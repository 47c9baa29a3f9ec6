"""Draws: the right distribution, and the same draws whoever makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.teacher_cache.draws import block_masses, draw_key, drawn_columns, position_keys, tally, uniforms


def drawn(logits_NV: Tensor, targets_ND: Tensor) -> Tensor:
    """`targets_ND` as shares of the whole mass."""
    reference_N = logits_NV.amax(dim=-1)
    masses_NC = block_masses(logits_NV, reference_N)
    return drawn_columns(logits_NV, reference_N, masses_NC, targets_ND * masses_NC.sum(dim=-1, keepdim=True))


def test_uniforms_are_splitmix64s() -> None:
    """Against the generator in Python's own integers, and over the whole of [0, 1)."""
    mask = (1 << 64) - 1

    def mixed(bits: int) -> int:
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
        return bits ^ bits >> 31

    key = draw_key(3, "00ff00ff00ff00ff")
    keys = position_keys(key, torch.arange(2_000))
    for position in (0, 1, 1_999):
        expected = mixed((key + position * 0x9E3779B97F4A7C15) & mask)
        assert keys[position].item() & mask == expected
        first = mixed((expected + 0x9E3779B97F4A7C15) & mask)
        assert uniforms(keys[position : position + 1], 3)[0, 0].item() == (first >> 11) * 2.0**-53
    spread = uniforms(keys, 32).flatten().sort().values.numpy()
    assert np.abs(spread - (np.arange(spread.size) + 0.5) / spread.size).max() < 1.63 / np.sqrt(spread.size)


def test_another_seed_sample_or_position_draws_anew() -> None:
    keys = {draw_key(seed, name) for seed in range(20) for name in ("a", "b", "c")}
    assert len(keys) == 60
    assert all(0 <= key < 1 << 63 for key in keys)
    assert len(set(position_keys(5, torch.arange(1_000)).tolist())) == 1_000


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 1_300), scale=st.floats(0.01, 10), seed=st.integers(0, 2**31))
def test_a_draw_is_where_the_running_sum_passes_its_target(width: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, width, generator=generator) * scale
    targets = torch.rand(3, 40, generator=generator, dtype=torch.float64)
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)
    columns = drawn(logits, targets)
    above = sums.gather(1, columns)
    below = above - logits.double().softmax(dim=-1).gather(1, columns)
    assert (below - 1e-6 <= targets).all()
    assert (targets <= above + 1e-6).all()


def test_nothing_is_drawn_that_has_no_mass_whatever_the_target() -> None:
    logits = torch.full((1, 700), -1e4)
    logits[0, [3, 300, 650]] = torch.tensor([0.0, -1.0, -2.0])
    targets = torch.cat([torch.linspace(0, 1, 999, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)])
    assert set(drawn(logits, targets[None])[0].tolist()) == {3, 300, 650}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ids_are_drawn_as_often_as_the_teacher_says(scale: float) -> None:
    """Chi-square over 600 ids and 200,000 draws, the rarest ids taken together."""
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(1)) * scale
    keys = position_keys(draw_key(0, "x"), torch.arange(2_000))
    columns = drawn(logits, uniforms(keys, 100).view(1, -1)).flatten()
    expected = logits.double().softmax(dim=-1)[0].numpy() * columns.numel()
    seen = np.bincount(columns.numpy(), minlength=600)
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    chi, freedom = float(((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()), expected.size - 1
    assert abs(chi - freedom) < 4 * np.sqrt(2 * freedom)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=20), by_count=st.booleans())
def test_a_tally_counts_each_id_once(ids: list[int], by_count: bool) -> None:
    """Logits tie in pairs of ids."""
    row = torch.tensor([ids])
    distinct, logits, counts = tally(row, -(row // 2).float(), by_count=by_count)
    ranked = sorted(set(ids), key=lambda token: (-ids.count(token) if by_count else token // 2, token))
    padding = len(ids) - len(ranked)
    assert distinct[0].tolist() == ranked + [-1] * padding
    assert counts[0].tolist() == [ids.count(token) for token in ranked] + [0] * padding
    assert logits[0].tolist() == [-float(token // 2) for token in ranked] + [-np.inf] * padding
