"""The teacher at another temperature, out of a head and a partition curve: within the error that is stated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense import Side, sampled_target, teacher_of, tempered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.distill.losses.partition import tempered_teacher

VOCAB = 4000
STATED_MEAN, STATED_MAX = 1.3e-3, 6e-3
"""Of log Z between nodes .5 and .25, as the module says of 64 kept ids."""


def zipf_logits(rows: int, *, seed: int = 0) -> Tensor:
    """Distributions like a language model's: a few strong ids, then a long tail that falls like a power of the rank."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, VOCAB + 1, dtype=torch.float64).log()
    slope = 1.0 + 1.5 * torch.rand(rows, 1, dtype=torch.float64, generator=generator)
    noise = torch.randn(rows, VOCAB, dtype=torch.float64, generator=generator)
    strong = 4 * torch.rand(rows, 1, dtype=torch.float64, generator=generator) * torch.exp(-rank)
    return -slope * rank + strong + 0.7 * noise


def log_z(side: Side, temperature: float) -> Tensor:
    return (side.log_p_NV / temperature).logsumexp(1)


def ours(side: Side, temperature: float, nodes: tuple[float, ...]) -> Tensor:
    """log Z(1/T), read off an exact id's log-probability."""
    rows = tempered_teacher(side.rows, torch.full((len(side.log_p_NV),), temperature), nodes, VOCAB)
    return side.rows.log_kept_NK[:, 0] / temperature - rows.log_kept_NK[:, 0]


@pytest.mark.parametrize("k", [12, 64])
def test_the_partition_function_stays_within_its_stated_error(k: int) -> None:
    side = teacher_of(zipf_logits(400), k, nodes=(0.5, 0.25))
    errors = torch.stack(
        [(ours(side, t, (0.5, 0.25)) - log_z(side, t)).abs() for t in torch.linspace(1, 4, 31).tolist()]
    )
    assert errors.mean() <= STATED_MEAN
    assert errors.max() <= STATED_MAX
    assert errors.max() > 1e-5, "it is an interpolation"
    finer = teacher_of(zipf_logits(400), k, nodes=(0.7, 0.5, 0.35, 0.25))
    fine = torch.stack(
        [(ours(finer, t, (0.7, 0.5, 0.35, 0.25)) - log_z(finer, t)).abs() for t in torch.linspace(1, 4, 31).tolist()]
    )
    assert fine.max() < errors.max() / 5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_at_a_node_it_is_exact(temperature: float) -> None:
    side = teacher_of(zipf_logits(50), 16, nodes=(0.5, 0.25))
    torch.testing.assert_close(ours(side, temperature, (0.5, 0.25)), log_z(side, temperature), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("draws", [0, 20])
@pytest.mark.parametrize("k", [4, 64])
def test_every_field_of_the_tempered_teacher_is_that_of_the_full_distribution(k: int, draws: int) -> None:
    side = teacher_of(zipf_logits(60), k, nodes=(0.5, 0.25), draws=draws)
    temperature_N = torch.linspace(1, 4, 60, dtype=torch.float64)
    rows = tempered_teacher(side.rows, temperature_N, (0.5, 0.25), VOCAB)
    log_p_T = tempered(side.log_p_NV, temperature_N)
    present = rows.present_NK
    close = {"rtol": 0.0, "atol": 2 * STATED_MAX}
    torch.testing.assert_close(rows.log_kept_NK[present], log_p_T.gather(1, rows.ids_NK)[present], **close)
    outside = torch.where(side.inside_NV, 0.0, log_p_T.exp()).sum(1)
    torch.testing.assert_close(rows.log_rest_N.exp(), outside, **close)
    torch.testing.assert_close(rows.entropy_N, -(log_p_T.exp() * log_p_T).sum(1), rtol=0.02, atol=0.02)
    want = sampled_target(side, temperature_N).gather(1, rows.ids_NK)[present]
    torch.testing.assert_close(rows.log_share_NK.exp()[present], want, rtol=2 * STATED_MAX, atol=1e-9)
    total = torch.where(present, rows.log_kept_NK.exp(), 0.0).sum(1) + rows.log_rest_N.exp()
    torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=50, deadline=None)
@given(log_tail=st.floats(-40, -1), temperature=st.floats(1, 4), rounding=st.floats(-1 / 2048, 1 / 2048))
def test_a_thin_tail_and_a_rounded_entropy_stay_a_distribution(
    log_tail: float, temperature: float, rounding: float
) -> None:
    logits = torch.cat([torch.zeros(1, 8), torch.full((1, 392), log_tail - 4)], 1).double()
    side = teacher_of(
        logits + 0.1 * torch.randn(1, 400, generator=torch.Generator().manual_seed(0)), 8, nodes=(0.5, 0.25)
    )
    coarse = dataclasses.replace(side.rows, entropy_N=side.rows.entropy_N + rounding)
    rows = tempered_teacher(coarse, torch.tensor([temperature]), (0.5, 0.25), 400)
    want = tempered(side.log_p_NV, torch.tensor([temperature]))
    assert rows.log_kept_NK[0, 0].item() == pytest.approx(want.gather(1, rows.ids_NK)[0, 0].item(), abs=0.05)
    assert (rows.log_kept_NK.exp().sum() + rows.log_rest_N.exp().sum()).item() == pytest.approx(1)


def test_an_empty_tail_stays_empty() -> None:
    side = teacher_of(zipf_logits(3), 8, nodes=(0.5, 0.25))
    nothing = torch.full((3,), -torch.inf, dtype=torch.float64)
    rows = dataclasses.replace(
        side.rows, log_rest_N=nothing, log_tail_N=nothing, curve_NJ=side.rows.curve_NJ * torch.inf
    )
    found = tempered_teacher(rows, torch.full((3,), 1.5), (0.5, 0.25), VOCAB)
    assert torch.isneginf(found.log_rest_N).all()
    torch.testing.assert_close(found.log_kept_NK, (side.rows.log_kept_NK / 1.5).log_softmax(1))
    assert found.entropy_N.isfinite().all()
