"""The estimate from drawn ids: unbiased over draws, at any temperature, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from dense import NODES, kl, teacher_of, tempered

from stages.distill.losses.fused import RowObjective, fused_rows
from stages.distill.losses.partition import tempered_teacher
from stages.distill.losses.rows import plain
from stages.distill.losses.rows import tempered as at_temperature
from stages.distill.losses.sampled import sampled_kl

VOCAB, REPEATS = 30, 6000


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("k", "draws"), [(0, 12), (5, 4)], ids=["sample", "hybrid"])
def test_over_draws_value_and_gradient_are_those_of_the_whole_kl(k: int, draws: int, temperature: float) -> None:
    torch.manual_seed(k)
    teacher_logits = torch.randn(1, VOCAB, dtype=torch.float64) * 2
    student = (torch.randn(1, VOCAB, dtype=torch.float64) * 2).requires_grad_()
    side = teacher_of(teacher_logits.expand(REPEATS, -1), k, draws=draws)
    t_N = torch.full((1,), temperature, dtype=torch.float64)
    whole = temperature**2 * kl(tempered(side.log_p_NV[:1], t_N).exp(), tempered(student, t_N).exp()).sum()
    (want,) = torch.autograd.grad(whole, student)
    # REPEATS rows with the same logits, each with draws of its own: row n's hidden vector picks its own logits.
    rows = student.detach().expand(REPEATS, -1).clone().requires_grad_()
    hidden = torch.eye(VOCAB, dtype=torch.float64)
    what = RowObjective(
        terms=[(at_temperature(sampled_kl) if temperature != 1 else plain(sampled_kl), 1.0)],
        temperature=lambda _, teacher: torch.full_like(teacher.log_rest_N, temperature),
        temper=lambda teacher, t: tempered_teacher(teacher, t, NODES, VOCAB),
    )
    fused = fused_rows(rows, hidden, side.rows, what)
    fused.objective.backward()
    assert rows.grad is not None
    error = rows.grad.std(0) / REPEATS**0.5
    assert ((rows.grad.mean(0) - want[0]).abs() < 5 * error + 1e-4).all()
    assert error.max() < 0.02, "the check could fail"
    assert fused.objective.item() / REPEATS == pytest.approx(whole.item(), abs=0.1)


def test_the_bucketed_value_of_draws_is_not_the_kl() -> None:
    """Why an estimate of the value goes through the cross-entropy: a bound over the ids drawn stays below the KL."""
    from stages.distill.losses.divergences import tail_bucket_kl

    torch.manual_seed(1)
    side = teacher_of(torch.randn(1, VOCAB, dtype=torch.float64).expand(500, -1), 0, draws=6)
    student = torch.randn(1, VOCAB, dtype=torch.float64)
    what = RowObjective(terms=[(plain(tail_bucket_kl), 1.0)])
    value = fused_rows(student.expand(500, -1), torch.eye(VOCAB, dtype=torch.float64), side.rows, what).objective / 500
    assert value < 0.9 * kl(side.log_p_NV[:1].exp(), student.softmax(1)).sum()
