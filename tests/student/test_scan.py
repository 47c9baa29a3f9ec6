"""O3: the scan in chunks and the compiled one are the naive one, in outputs, last state and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.distill.compiled_scan import scan_compiled
from stages.student.scan_chunked import SEGMENT, scan_chunked
from stages.student.scan_naive import scan_naive

each_scan = pytest.mark.parametrize("scan", [scan_chunked, scan_compiled])


def draw(
    steps: int, *, dtype: torch.dtype = torch.float64, heads: int = 2, keys: int = 5, values: int = 3, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    query, key = normal(2, 2, steps, heads, keys)
    log_decay = -5 * torch.rand(2, steps, heads, keys, dtype=dtype, generator=generator) ** 3
    return query, key, normal(2, steps, heads, values), log_decay, normal(2, heads, keys, values)


def run_with_gradients(scan, inputs) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output, state = scan(*leaves)
    weight = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    gradients = torch.autograd.grad((output * weight).sum() + state.square().sum(), leaves)
    return output.detach(), state.detach(), *gradients


@each_scan
@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 200), with_state=st.booleans(), seed=st.integers(0, 1000))
def test_O3_a_scan_equals_naive_for_any_length(scan, steps, with_state, seed):
    inputs = draw(steps, seed=seed)[: 5 if with_state else 4]
    for mine, expected in zip(run_with_gradients(scan, inputs), run_with_gradients(scan_naive, inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@each_scan
def test_O3_a_sequence_of_several_segments_is_one_scan(scan):
    inputs = list(draw(2 * SEGMENT + 37, heads=1, keys=2, values=1))
    inputs[3] = inputs[3] * 1e-3  # what enters a segment reaches its end
    for mine, expected in zip(run_with_gradients(scan, inputs), run_with_gradients(scan_naive, inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@each_scan
def test_O3_gradcheck_across_a_chunk_border(scan):
    query, key, value, log_decay, state = (
        tensor[:1].requires_grad_() for tensor in draw(67, heads=1, keys=2, values=1)
    )
    assert torch.autograd.gradcheck(scan, (query, key, value, log_decay, state))


@each_scan
@pytest.mark.parametrize("steps", [16, 64, 150])
def test_O3_fastest_decay_stays_exact_in_fp32(scan, steps):
    inputs = list(draw(steps, dtype=torch.float32))
    inputs[3] = torch.full_like(inputs[3], -5.0)
    exact = run_with_gradients(scan_naive, [tensor.double() for tensor in inputs])
    for mine, expected in zip(run_with_gradients(scan, inputs), exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("scan", "error"), [(scan_chunked, 1e-6), (scan_compiled, 2e-6)])
def test_O3_long_memory_stays_exact_in_fp32(scan, error):
    """In chunks decays are summed before they are exponentiated; step by step each is rounded, as in the loop."""
    inputs = list(draw(700, dtype=torch.float32))
    inputs[3] = inputs[3] * 1e-3
    exact = run_with_gradients(scan_naive, [tensor.double() for tensor in inputs])
    for mine, expected in zip(run_with_gradients(scan, inputs), exact, strict=True):
        assert (mine.double() - expected).norm() / expected.norm() < error


@each_scan
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100])
def test_O4_a_sequence_in_two_parts_equals_the_whole(scan, cut):
    *sequences, state = draw(130)
    whole, last = scan(*sequences, state)
    first, carried = scan(*(tensor[:, :cut] for tensor in sequences), state)
    second, last_of_parts = scan(*(tensor[:, cut:] for tensor in sequences), carried)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(last_of_parts, last, rtol=1e-10, atol=1e-11)
