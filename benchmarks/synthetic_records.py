"""Records of a teacher that nobody asked: for benchmarks that read sets or train from them, and look at no word."""

from __future__ import annotations

import numpy as np

from shards.contract import Contract, Selection
from shards.planes.codec import Planes3
from shards.record import Record

K = 64
SLOPES = 50
"""Distinct distributions of a record, at most: each takes a sum over the whole vocabulary."""


def synthetic_contract(vocab_size: int) -> Contract:
    return Contract(
        codec=Planes3.name,
        teacher="synthetic",
        teacher_fingerprint="1" * 64,
        tokenizer_fingerprint="2" * 64,
        vocab_size=vocab_size,
        start_token_id=0,
        end_token_id=1,
        selection=Selection(kind="topk", k=K),
        attention=None,
        corpus_fingerprint="3" * 64,
        engine="synthetic 1",
        dtype="float32+float32",
    )


def synthetic_record(
    rng: np.random.Generator, vocab_size: int, *, sample_id: str, prompt: int, response: int
) -> Record:
    """Zipf's law with an exponent of its own at each position, over ids drawn at random; lengths in tokens."""
    ranks_V = np.log(np.arange(1, vocab_size + 1))
    slopes_N = rng.uniform(1.2, 3.0, min(response, SLOPES))
    log_sums_N = np.array([np.logaddexp.reduce(-slope * ranks_V) for slope in slopes_N])
    slopes_N, log_sums_N = np.resize(slopes_N, response), np.resize(log_sums_N, response)
    logprobs_NK = -slopes_N[:, None] * ranks_V[:K] - log_sums_N[:, None]
    rising_NK = rng.integers(1, vocab_size // K, (response, K)).cumsum(axis=1) - 1
    ids_NK = rng.permuted(rising_NK, axis=1)
    return Record(
        sample_id=sample_id,
        prompt_ids_P=rng.integers(0, vocab_size, prompt, np.int32),
        response_ids_R=rng.integers(0, vocab_size, response, np.int32),
        first_position=0,
        ids_NK=ids_NK.astype(np.int32),
        logprobs_NK=logprobs_NK.astype(np.float32),
        log_tail_N=np.log1p(-np.exp(logprobs_NK).sum(axis=1)).astype(np.float32),
        entropy_N=np.full(response, 2.0, np.float32),
    )
