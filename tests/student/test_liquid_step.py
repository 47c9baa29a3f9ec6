"""The closed form of an LTC step against the solvers that it replaces (O2)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.student.recurrences import liquid_step

conductances = st.floats(0, 4)
leaks = st.floats(1e-6, 1)


@pytest.fixture
def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    leak, conductance, target, start = torch.rand(4, 50, dtype=torch.float64, generator=generator)
    return leak, 4 * conductance, target - 0.5, start - 0.5


@pytest.mark.parametrize("unfolds", [1, 2, 6, 50])
@pytest.mark.parametrize("elapsed", [1.0, 0.25])
def test_O2_closed_form_equals_the_loop_of_fused_euler_steps(problem, unfolds, elapsed):
    leak, conductance, target, state = problem
    log_decay, written = liquid_step(leak, conductance, elapsed, unfolds)
    expected, step = state.clone(), elapsed / unfolds
    for _ in range(unfolds):
        expected = (expected + step * conductance * target) / (1 + step * (leak + conductance))
    torch.testing.assert_close(log_decay.exp() * state + written * target, expected, rtol=1e-13, atol=1e-14)


def test_O2_exact_flow_equals_rk4(problem):
    leak, conductance, target, state = problem
    log_decay, written = liquid_step(leak, conductance, 1.0, 0)

    def slope(x):
        return -(leak + conductance) * x + conductance * target

    expected, steps = state.clone(), 500
    h = 1 / steps
    for _ in range(steps):
        k1 = slope(expected)
        k2 = slope(expected + h / 2 * k1)
        k3 = slope(expected + h / 2 * k2)
        k4 = slope(expected + h * k3)
        expected = expected + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(log_decay.exp() * state + written * target, expected, rtol=1e-11, atol=1e-12)


@given(leak=leaks, conductance=conductances, unfolds=st.integers(0, 12), elapsed=st.sampled_from([0.0, 0.5, 1.0]))
def test_decay_and_write_are_a_bounded_average(leak, conductance, unfolds, elapsed):
    """alpha + beta <= 1 keeps a state within the values written to it; log alpha >= -5 keeps the scan in fp32."""
    log_decay, written = liquid_step(torch.tensor(leak), torch.tensor(conductance), elapsed, unfolds)
    assert -5 <= log_decay <= 0
    assert 0 <= written <= 1
    assert log_decay.exp() + written <= 1 + 1e-6
    if elapsed == 0:
        assert log_decay == 0
        assert written == 0


@pytest.mark.parametrize("unfolds", [0, 1, 6])
def test_gradients_stay_finite_where_nothing_decays(unfolds):
    leak = torch.full((3,), 1e-30, requires_grad=True)
    conductance = torch.tensor([0.0, 1e-30, 1e-3], requires_grad=True)
    log_decay, written = liquid_step(leak, conductance, 1.0, unfolds)
    gradients = torch.autograd.grad((log_decay + written).sum(), (leak, conductance))
    assert all(gradient.isfinite().all() for gradient in gradients)
