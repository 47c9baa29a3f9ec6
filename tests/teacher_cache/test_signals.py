"""The tensor maths against numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.teacher_cache.signals import (
    attention_heads_sum,
    complete,
    mask_kept,
    shorten,
    summarise_attention,
    tail_sums,
)
from stages.wide_topk import select_topk


def random_logits(rows: int, width: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def reduced(logits_NV: Tensor, k: int, curve: tuple[float, ...] = ()) -> tuple[Tensor, ...]:
    """Kept columns, log-probs, log tail, entropy and curve, as the head computes them on one shard."""
    logits_NV = logits_NV.clone()
    values, columns = select_topk(logits_NV, k + 1)
    mask_kept(logits_NV, columns, (torch.arange(k + 1) < k).expand_as(columns), values[:, -1])
    sums = tail_sums(logits_NV, values[:, -1], curve)
    return columns[:, :k], *complete(values[:, :k], values[:, -1], sums, curve)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(8, 3_000), k=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_select_topk_is_exact_at_every_width(rows: int, width: int, k: int, seed: int) -> None:
    logits = random_logits(rows, width, seed)
    values, columns = select_topk(logits, k)
    assert torch.equal(values, logits.sort(dim=-1, descending=True).values[:, :k])
    assert torch.equal(logits.gather(-1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


@settings(max_examples=40, deadline=None)
@given(width=st.integers(64, 2_000), k=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_equal_logits_stand_by_rising_column(width: int, k: int, seed: int) -> None:
    logits = random_logits(3, width, seed).round()
    values, columns = select_topk(logits, k)
    assert torch.equal(values, logits.sort(dim=-1, descending=True).values[:, :k])
    for value_row, column_row in zip(values.tolist(), columns.tolist(), strict=True):
        keys = [(-value, column) for value, column in zip(value_row, column_row, strict=True)]
        assert keys == sorted(set(keys))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(21, 4_000), k=st.integers(1, 20), scale=st.floats(0.01, 12.0), seed=st.integers(0, 2**31))
def test_logprobs_tail_and_entropy_against_float64(width: int, k: int, scale: float, seed: int) -> None:
    logits = random_logits(4, width, seed, scale)
    columns, logprobs, log_tail, entropy, _ = reduced(logits, k)
    truth = logits.double().log_softmax(dim=-1)
    true_tail = truth.scatter(-1, columns, -torch.inf).logsumexp(dim=-1)
    assert torch.allclose(logprobs.double(), truth.gather(-1, columns), atol=2e-5, rtol=2e-6)
    assert torch.allclose(log_tail.double(), true_tail, atol=2e-5, rtol=2e-6)
    assert torch.allclose(entropy.double(), -(truth.exp() * truth).sum(dim=-1), atol=2e-5, rtol=1e-5)


def test_a_tail_far_below_single_precision_keeps_its_digits() -> None:
    logits = torch.full((1, 500), -160.0)
    logits[0, :4] = torch.tensor([50.0, 49.0, 48.0, 47.0])
    logits[0, 4:] += torch.linspace(-1, 0, 496)
    _, _, log_tail, _, _ = reduced(logits, 4)
    truth = logits.double().log_softmax(dim=-1)[:, 4:].logsumexp(dim=-1)
    assert truth.item() < -200
    assert log_tail.double().item() == pytest.approx(truth.item(), abs=1e-4)


def true_curve(logprobs_NV: Tensor, columns: Tensor, nodes: tuple[float, ...]) -> Tensor:
    """In float64 over the ids that are not among `columns`, by automatic differentiation; -1 is no column."""
    rows = []
    for logprobs, kept in zip(logprobs_NV.double(), columns.tolist(), strict=True):
        outside = [index for index in range(len(logprobs)) if index not in set(kept)]
        powers = torch.tensor(nodes, dtype=torch.float64, requires_grad=True)
        values = (powers[:, None] * logprobs[outside]).logsumexp(dim=-1)
        (slopes,) = torch.autograd.grad(values.sum(), powers)
        rows.append(torch.cat([values.detach(), slopes]))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(24, 1_500),
    k=st.integers(0, 20),
    scale=st.floats(0.01, 12.0),
    seed=st.integers(0, 2**31),
    nodes=st.sampled_from([(0.5, 0.25), (0.7, 0.5, 0.35, 0.25), (0.9,), (0.125,)]),
)
def test_the_partition_curve_against_float64(
    width: int, k: int, scale: float, seed: int, nodes: tuple[float, ...]
) -> None:
    """k = 0 is the whole vocabulary's curve, which a sampled selection keeps."""
    logits = random_logits(3, width, seed, scale)
    columns, _, _, _, curve = reduced(logits, k, nodes)
    truth = true_curve(logits.double().log_softmax(dim=-1), columns, nodes)
    assert torch.allclose(curve.double(), truth, atol=5e-5, rtol=1e-5)


def test_the_curve_of_a_tail_far_below_single_precision_keeps_its_digits() -> None:
    logits = torch.full((1, 500), -300.0)
    logits[0, :4] = torch.tensor([50.0, 49.0, 48.0, 47.0])
    logits[0, 4:] += torch.linspace(-1, 0, 496)
    columns, _, _, _, curve = reduced(logits, 4, (0.5, 0.25))
    truth = true_curve(logits.double().log_softmax(dim=-1), columns, (0.5, 0.25))
    assert torch.allclose(curve.double(), truth, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(24, 1_500),
    k=st.integers(1, 20),
    scale=st.floats(0.01, 12.0),
    seed=st.integers(0, 2**31),
    mass=st.floats(0.01, 1.0),
    floor=st.floats(0.0, 0.2),
)
def test_an_adaptive_head_stops_at_the_mass_or_the_floor_and_leaves_the_rest_to_the_tail(
    width: int, k: int, scale: float, seed: int, mass: float, floor: float
) -> None:
    nodes = (0.5, 0.25)
    logits = random_logits(4, width, seed, scale)
    columns, logprobs, log_tail, _, curve = reduced(logits, k, nodes)
    whole = {"ids": columns, "logprobs": logprobs}
    ids, logprobs, log_tail, curve = shorten(columns, logprobs, log_tail, curve, mass=mass, floor=floor, curve=nodes)
    truth = logits.double().log_softmax(dim=-1)
    for row in range(4):
        kept = 0
        probs = whole["logprobs"][row].double().exp().tolist()
        while kept < k and (kept == 0 or (sum(probs[:kept]) < mass and probs[kept] >= floor)):
            kept += 1
        assert ids[row].tolist() == whole["ids"][row, :kept].tolist() + [-1] * (k - kept)
        assert logprobs[row].tolist() == whole["logprobs"][row, :kept].tolist() + [-np.inf] * (k - kept)
        outside = truth[row].index_fill(0, ids[row, :kept], -torch.inf).logsumexp(dim=-1)
        assert log_tail[row].item() == pytest.approx(outside.item(), abs=5e-5, rel=1e-5)
    assert torch.allclose(curve.double(), true_curve(truth, ids, nodes), atol=5e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(9, 400), k=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_tail_sums_add_up_over_shards(cut: int, k: int, seed: int) -> None:
    logits = random_logits(3, 408, seed)
    _, columns = select_topk(logits, k)
    reference = logits.scatter(-1, columns, -torch.inf).amax(dim=-1)
    whole = logits.clone()
    mask_kept(whole, columns, torch.ones_like(columns, dtype=torch.bool), reference)
    parts = torch.zeros(3, 3, 2)
    for start, stop in ((0, cut), (cut, 408)):
        shard = logits[:, start:stop].clone()
        own = shard.topk(min(k + 1, shard.shape[1]), dim=-1).indices
        mask_kept(shard, own, ((own + start)[:, :, None] == columns[:, None, :]).any(dim=-1), reference)
        parts += tail_sums(shard, reference, (0.5, 0.25))
    assert torch.allclose(parts, tail_sums(whole, reference, (0.5, 0.25)), rtol=1e-5, atol=1e-5)


def naive_attention(queries: Tensor, keys: Tensor, first_row: int, scale: float, window: int | None) -> np.ndarray:
    """[N, S] head mean, by loops in float64."""
    rows, heads, _ = queries.shape
    span, key_heads, _ = keys.shape
    mean = np.zeros((rows, span))
    for row in range(rows):
        position = first_row + row
        visible = [s for s in range(position + 1) if window is None or s > position - window]
        for head in range(heads):
            key = keys[:, head // (heads // key_heads)].double().numpy()
            scores = key[visible] @ queries[row, head].double().numpy() * scale
            powers = np.exp(scores - scores.max())
            mean[row, visible] += powers / powers.sum() / heads
    return mean


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (4, 4)])
def test_attention_rows_against_loops(heads: int, key_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(heads)
    keys = torch.randn(23, key_heads, 8, generator=generator)
    queries = torch.randn(9, heads, 8, generator=generator) * 2
    sums = attention_heads_sum(queries, keys, first_row=14, scale=0.7, window=window)
    expected = naive_attention(queries, keys, 14, 0.7, window)
    assert np.abs(sums.numpy() / heads - expected).max() < 1e-6


@pytest.mark.parametrize("prompt_length", [1, 2, 6, 20])
def test_attention_summary_keeps_the_prompt_apart_from_sink_and_response(prompt_length: int) -> None:
    mean = torch.rand(5, 30, generator=torch.Generator().manual_seed(prompt_length)).softmax(dim=-1)
    positions, weights, sink, prompt, entropy = summarise_attention(mean, prompt_length, 8)
    kept = min(8, prompt_length - 1)
    assert (positions[:, kept:] == -1).all()
    assert (weights[:, kept:] == 0).all()
    for row in range(5):
        keys = sorted(range(1, prompt_length), key=lambda key: -mean[row, key].item())[:kept]
        assert positions[row, :kept].tolist() == keys
        assert weights[row, :kept].tolist() == [mean[row, key].item() for key in keys]
    assert torch.equal(sink, mean[:, 0])
    assert torch.allclose(prompt, mean[:, 1:prompt_length].sum(dim=-1))
    truth = -(mean.double() * mean.double().log()).sum(dim=-1)
    assert torch.allclose(entropy.double(), truth, atol=1e-6)


def test_keys_that_a_row_does_not_see_weigh_nothing_and_stand_last_by_position() -> None:
    """Rows of the prompt see no key behind their own, and with a window none far in front."""
    mean = torch.zeros(2, 12)
    mean[0, :4] = torch.tensor([0.4, 0.1, 0.3, 0.2])
    mean[1, 5:8] = torch.tensor([0.2, 0.5, 0.3])
    positions, weights, sink, prompt, _ = summarise_attention(mean, 9, 6)
    assert positions.tolist() == [[2, 3, 1, 4, 5, 6], [6, 7, 5, 1, 2, 3]]
    assert weights.tolist() == [[*mean[0, [2, 3, 1]].tolist(), 0, 0, 0], [*mean[1, [6, 7, 5]].tolist(), 0, 0, 0]]
    assert sink.tolist() == [mean[0, 0].item(), 0]
    assert prompt.tolist() == pytest.approx([0.6, 1.0])
    for whole, cut in zip(summarise_attention(mean, 9, 6), summarise_attention(mean[:1, :4], 9, 6), strict=True):
        assert torch.equal(whole[:1], cut)
