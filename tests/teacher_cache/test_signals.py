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
    summarise_attention,
    tail_sums,
)
from stages.wide_topk import select_topk


def random_logits(rows: int, width: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def reduced(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept columns, log-probs, log tail and entropy, as the head computes them on one shard."""
    values, columns = select_topk(logits_NV, k + 1)
    kept = (torch.arange(k + 1) < k).expand_as(columns)
    sums = tail_sums(logits_NV, columns, kept, values[:, -1])
    return columns[:, :k], *complete(values[:, :k], values[:, -1], sums)


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
    columns, logprobs, log_tail, entropy = reduced(logits, k)
    truth = logits.double().log_softmax(dim=-1)
    true_tail = truth.scatter(-1, columns, -torch.inf).logsumexp(dim=-1)
    assert torch.allclose(logprobs.double(), truth.gather(-1, columns), atol=2e-5, rtol=2e-6)
    assert torch.allclose(log_tail.double(), true_tail, atol=2e-5, rtol=2e-6)
    assert torch.allclose(entropy.double(), -(truth.exp() * truth).sum(dim=-1), atol=2e-5, rtol=1e-5)


def test_a_tail_far_below_single_precision_keeps_its_digits() -> None:
    logits = torch.full((1, 500), -160.0)
    logits[0, :4] = torch.tensor([50.0, 49.0, 48.0, 47.0])
    logits[0, 4:] += torch.linspace(-1, 0, 496)
    _, _, log_tail, _ = reduced(logits, 4)
    truth = logits.double().log_softmax(dim=-1)[:, 4:].logsumexp(dim=-1)
    assert truth.item() < -200
    assert log_tail.double().item() == pytest.approx(truth.item(), abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(9, 400), k=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_tail_sums_add_up_over_shards(cut: int, k: int, seed: int) -> None:
    logits = random_logits(3, 408, seed)
    values, columns = select_topk(logits, k + 1)
    kept = (torch.arange(k + 1) < k).expand_as(columns)
    whole = tail_sums(logits, columns, kept, values[:, -1])
    parts = torch.zeros_like(whole)
    for start, stop in ((0, cut), (cut, 408)):
        shard = logits[:, start:stop]
        own = shard.topk(min(k + 1, shard.shape[1]), dim=-1).indices
        own_kept = ((own + start)[:, :, None] == columns[:, None, :k]).any(dim=-1)
        parts += tail_sums(shard, own, own_kept, values[:, -1])
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-5)


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
