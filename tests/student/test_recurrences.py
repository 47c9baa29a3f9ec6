"""The kinds of recurrence: each is the ODE that its docstring names, looped, in chunks, and primed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.student.config import MiniCodformerConfig
from stages.student.recurrences import RECURRENCES, DeltaRecurrence, VectorRecurrence
from stages.student.scan_delta import scan_delta_chunked, scan_delta_naive

WIDTH, HEADS = 8, 2


def config(**changes) -> MiniCodformerConfig:
    return MiniCodformerConfig(vocab_size=17, hidden_size=WIDTH, num_attention_heads=HEADS, **changes)


def draw_delta(steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    def share() -> Tensor:
        return torch.rand(2, steps, 2, dtype=dtype, generator=generator)

    key = torch.nn.functional.normalize(normal(2, steps, 2, 5), dim=-1)
    decay = -5 * share() ** 3
    return [normal(2, steps, 2, 5), key, normal(2, steps, 2, 3), decay, share(), share(), normal(2, 2, 5, 3)]


def run_with_gradients(scan, inputs) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output, state = scan(*leaves)
    weight = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    gradients = torch.autograd.grad((output * weight).sum() + state.square().sum(), leaves)
    return output.detach(), state.detach(), *gradients


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 200), with_state=st.booleans(), seed=st.integers(0, 1000))
def test_O3_delta_in_chunks_equals_the_loop_with_every_gradient(steps, with_state, seed):
    inputs = draw_delta(steps, seed)[: 7 if with_state else 6]
    for mine, expected in zip(
        run_with_gradients(scan_delta_chunked, inputs), run_with_gradients(scan_delta_naive, inputs), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_O3_the_fastest_decay_of_delta_stays_exact_in_fp32():
    inputs = draw_delta(150, dtype=torch.float32)
    inputs[3] = torch.full_like(inputs[3], -5.0)
    exact = run_with_gradients(scan_delta_naive, [tensor.double() for tensor in inputs])
    for mine, expected in zip(run_with_gradients(scan_delta_chunked, inputs), exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=2e-5, atol=2e-5)


def fused_euler(kind: str, leak: Tensor, f: Tensor, key: Tensor, value: Tensor, state: Tensor, unfolds: int) -> Tensor:
    """(I + h (leak + f P)) S' = S + h f k v^T, solved densely `unfolds` times; P is I, or k k^T for the delta rule."""
    h, eye = 1 / unfolds, torch.eye(len(key))
    along = torch.outer(key, key) if kind == "delta" else eye
    matrix = eye + h * (torch.diag(leak.expand(len(key))) + f.expand(len(key))[:, None] * along)
    for _ in range(unfolds):
        state = torch.linalg.solve(matrix, state + h * torch.outer(f.expand(len(key)) * key, value))
    return state


@pytest.mark.parametrize("unfolds", [1, 6])
@pytest.mark.parametrize("kind", ["matrix", "delta"])
def test_O2_a_matrix_is_its_ode_by_fused_euler_steps(kind, unfolds):
    torch.manual_seed(2)
    recurrence = RECURRENCES[kind](config(ode_unfolds=unfolds))
    recurrence.initialize()
    command = torch.randn(1, 70, 4 * WIDTH)
    read, last = recurrence(command, None, None)
    query, key, value, gate = (part.unflatten(-1, (HEADS, WIDTH // HEADS))[0] for part in command.chunk(4, -1))
    size = WIDTH // HEADS
    key = key / key.norm(dim=-1, keepdim=True) * (1 if kind == "delta" else size**0.5)
    leak = (1 / (1 + recurrence.rho.exp())).view(HEADS, -1)
    gate = gate.sum(-1, keepdim=True) / size**0.5 if kind == "delta" else gate
    conductance = 4 * torch.sigmoid(gate + recurrence.conductance_bias.view(HEADS, -1))
    for head in range(HEADS):
        state = torch.zeros(size, size)
        for step in range(70):
            token = (leak[head], conductance[step, head], key[step, head], value[step, head])
            state = fused_euler(kind, *token, state, unfolds)
            expected = torch.nn.functional.silu(query[step, head]) @ state
            torch.testing.assert_close(
                read[0, step].view(HEADS, size)[head], expected, rtol=1e-4, atol=1e-5, msg=f"token {step}"
            )
        torch.testing.assert_close(last[0, head], state, rtol=1e-4, atol=1e-5)


def test_O2_the_one_step_of_delta_is_gated_deltanet():
    generator = torch.Generator().manual_seed(3)
    leak, conductance = torch.tensor([0.3]), torch.tensor([2.0])
    key = torch.nn.functional.normalize(torch.randn(4, generator=generator), dim=0)
    value, state = torch.randn(4, generator=generator), torch.randn(4, 4, generator=generator)
    alpha, beta = 1 / (1 + leak), conductance / (1 + leak + conductance)
    expected = alpha * (torch.eye(4) - beta * torch.outer(key, key)) @ state + beta * torch.outer(key, value)
    torch.testing.assert_close(fused_euler("delta", leak, conductance, key, value, state, 1), expected)
    token, rate = (1, 1, 1, 4), (1, 1, 1)
    _, scanned = scan_delta_naive(
        torch.zeros(token),
        key.view(token),
        value.view(token),
        alpha.log().view(rate),
        beta.view(rate),
        beta.view(rate),
        state[None, None],
    )
    torch.testing.assert_close(scanned[0, 0], expected)


def test_O2_the_vector_recurrence_is_the_loop_of_fused_euler_steps_of_an_ltc_neuron():
    recurrence = VectorRecurrence(config())
    recurrence.initialize()
    command = torch.randn(2, 9, 2 * WIDTH)
    read, state = recurrence(command, None, None)
    target, gate = command.chunk(2, -1)
    leak, conductance = (rate.squeeze(-1) for rate in recurrence._rates(gate[..., None]))
    x, unfolds = torch.zeros(2, WIDTH), 6
    for step in range(9):
        for _ in range(unfolds):
            f = conductance[:, step]
            x = (x + f * target[:, step] / unfolds) / (1 + (leak + f) / unfolds)
        torch.testing.assert_close(read[:, step], x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[..., 0, 0], x, rtol=1e-5, atol=1e-6)


def test_a_delta_head_has_one_time_constant_from_2_to_512():
    recurrence = DeltaRecurrence(config())
    recurrence.initialize()
    torch.testing.assert_close(1 + recurrence.rho.exp(), torch.tensor([2.0, 512.0]))


@pytest.mark.parametrize("kind", ["matrix", "vector", "delta"])
def test_a_primed_decoder_starts_from_the_state_after_the_encoding(make_student, tokens, kind):
    student = make_student(recurrence=kind, prime_state=True)
    mixer = student.model.decoder.layers[0].mixer
    prompt = tokens(2, 11, seed=1)
    encoded = student.get_encoder()(prompt).last_hidden_state
    _, expected = mixer.recurrence(mixer.command_activity(encoded, 11), None, None)
    torch.testing.assert_close(mixer.primed(encoded, None), expected)
    padded = torch.cat([encoded, torch.randn(2, 4, 32)], 1)
    real = torch.arange(15).expand(2, -1) < 11
    torch.testing.assert_close(mixer.primed(padded, real), expected)
    assert expected.abs().max() > 1e-3

    seen = []
    mixer.recurrence.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    student(prompt, decoder_input_ids=tokens(2, 5, seed=2))
    torch.testing.assert_close(seen[-1], expected)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="recurrence must be one of matrix, vector, delta"):
        config(recurrence="tensor")
    with pytest.raises(ValueError, match="wiring must be one of ncp, dense"):
        config(wiring="sparse")
