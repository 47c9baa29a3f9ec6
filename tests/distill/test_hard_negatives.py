"""The water-filled tail: it bounds the KL from below as tightly as a top-k can, and its gradient is q - p*."""

from __future__ import annotations

import pytest
import torch
from dense import kl, teacher_of, water_filled_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.distill.losses.divergences import tail_bucket_kl
from stages.distill.losses.fused import FusedRows, RowObjective, fused_rows
from stages.distill.losses.hard_negatives import hard_mass, hard_share, water_filled_kl
from stages.distill.losses.rows import TeacherRows, tempered

TERMS = [(tempered(water_filled_kl), 1.0), (hard_share, 0.0), (hard_mass, 0.0), (tempered(tail_bucket_kl), 0.0)]


def fused(logits_NV: Tensor, teacher: TeacherRows, negatives: int) -> FusedRows:
    """With the identity as hidden rows, logits are the weight: their gradient can be looked at."""
    identity = torch.eye(len(logits_NV), dtype=logits_NV.dtype)
    return fused_rows(identity, logits_NV.T, teacher, RowObjective(terms=TERMS, hard_negatives=negatives))


def logits(seed: int, rows: int, vocab: int, scale: float) -> Tensor:
    return torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 40),
    negatives=st.integers(1, 60),
    teacher_scale=st.floats(0.01, 6.0),
    student_scale=st.floats(0.01, 6.0),
)
def test_it_lies_between_the_tail_bucket_and_the_whole_kl(
    seed: int, k: int, negatives: int, teacher_scale: float, student_scale: float
) -> None:
    side = teacher_of(logits(seed, 9, 50, teacher_scale), k)
    student = logits(seed + 1, 9, 50, student_scale)
    for row in range(9):
        rows = side.rows.rows(slice(row, row + 1))
        value, _, _, bucket = fused(student[row : row + 1], rows, negatives).sums
        whole = kl(side.log_p_NV[row : row + 1].exp(), student[row : row + 1].softmax(1))
        assert bucket - 1e-10 <= value <= whole + 1e-10


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 20), scale=st.floats(0.1, 5.0))
def test_its_gradient_is_q_minus_the_water_filled_target(seed: int, k: int, scale: float) -> None:
    side = teacher_of(logits(seed, 9, 50, scale), k)
    student = logits(seed + 1, 9, 50, scale).requires_grad_()
    fused(student, side.rows, 50).objective.backward()
    q = student.detach().softmax(1)
    target = water_filled_target(q, side.log_p_NV.exp(), side.inside_NV)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, q - target, rtol=0, atol=1e-11)


def test_no_tail_that_the_cache_permits_is_nearer_to_the_student() -> None:
    side = teacher_of(logits(0, 1, 12, 1.5), 3)
    student = logits(1, 1, 12, 2.0)
    value = fused(student, side.rows, 12).objective
    q, p, inside = student.softmax(1)[0], side.log_p_NV.exp()[0], side.inside_NV[0]
    kappa, rho = p[inside].min(), p[~inside].sum()
    best = water_filled_target(student.softmax(1), side.log_p_NV.exp(), side.inside_NV)[0, ~inside]
    generator = torch.Generator().manual_seed(2)
    found = []
    for share in torch.logspace(-4, 0, 2000).tolist():
        raw = torch.rand(9, dtype=torch.float64, generator=generator) ** 2
        tail = (1 - share) * best + share * raw / raw.sum() * rho
        if tail.max() <= kappa:
            candidate = p.clone()
            candidate[~inside] = tail
            found.append(kl(candidate[None], q[None]).item())
    assert len(found) > 200
    assert value <= min(found) < 1.001 * value


def test_a_student_that_is_surer_than_the_teacher_can_have_meant_is_told_so() -> None:
    side = teacher_of(torch.tensor([[3.0, 2.0, 1.0] + [0.0] * 20], dtype=torch.float64), 3)
    student = side.log_p_NV.clone()
    agreed = fused(student, side.rows, 8)
    assert [value.item() for value in agreed.sums[:3]] == pytest.approx([0, 0, 0], abs=1e-12)
    student[0, 7] = 2.5  # outside the kept ids, and likelier than the least likely of them
    off = fused(student.requires_grad_(), side.rows, 8)
    off.objective.backward()
    q, kappa = student.detach().softmax(1)[0], side.log_p_NV.exp()[0, 2]
    assert off.sums[1] == 1
    assert off.sums[2].item() == pytest.approx(q[7].item())
    assert student.grad is not None
    assert student.grad[0, 7].item() == pytest.approx((q[7] - kappa).item())


def test_more_candidates_tighten_the_bound_until_all_hard_ones_are_among_them() -> None:
    side = teacher_of(logits(3, 64, 300, 1.0), 12)
    student = logits(4, 64, 300, 3.0)
    values = [fused(student, side.rows, negatives).objective.item() for negatives in (1, 2, 4, 8, 16, 64, 256)]
    assert values == sorted(values)
    assert values[0] < values[-2] == pytest.approx(values[-1], rel=1e-9)
