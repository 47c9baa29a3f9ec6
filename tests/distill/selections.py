"""Records of every selection, in memory, from a teacher that is known in full."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from shards.contract import AttentionSpec, Contract, Selection
from shards.record import AttentionSummary, Record

VOCAB = 211
TOP_M = 4
CURVE = (0.5, 0.25)
_COMMON = np.random.default_rng(5).normal(size=VOCAB)

SELECTIONS = {
    "topk": Selection(kind="topk", k=8),
    "adaptive": Selection(kind="adaptive", k=8, mass=0.7, floor=0.03),
    "hybrid": Selection(kind="hybrid", k=5, draws=7),
    "sample": Selection(kind="sample", draws=12),
    "counts": Selection(kind="sample", draws=12, logprobs=False),
}


def contract_of(selection: Selection, *, curve: tuple[float, ...] = CURVE, rows: str = "all") -> Contract:
    return Contract(
        codec="in memory",
        teacher="tiny",
        teacher_fingerprint="a" * 64,
        tokenizer_fingerprint="b" * 64,
        vocab_size=VOCAB,
        start_token_id=0,
        end_token_id=1,
        selection=selection,
        curve=curve if selection.logprobs else (),
        attention=AttentionSpec(layers=(3, 7), top_m=TOP_M, rows=rows),
        corpus_fingerprint="c" * 64,
        engine="none 0",
        dtype="float32+float32",
    )


def record_of(index: int, selection: Selection, *, rows: str = "all") -> Record:
    """A few tokens of prompt and response, and all that the contract of `contract_of` says about them."""
    rng = np.random.default_rng([17, index])
    length, prompt = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    logits = 2 * _COMMON + 2 * rng.normal(size=(length, VOCAB))  # some ids are likelier everywhere: that can be learnt
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    kept = [_keep(row, selection, rng) for row in log_p]
    width = max(len(ids) for ids, _, _ in kept)
    ids = np.full((length, width), -1, np.int32)
    draws = np.zeros((length, width), np.int32)
    logprobs = np.full((length, width), -np.inf)
    tails, curves = np.empty(length), np.empty((length, 2 * len(CURVE)))
    for n, (chosen, counts, exact) in enumerate(kept):
        ids[n, : len(chosen)], draws[n, : len(chosen)] = chosen, counts
        logprobs[n, : len(chosen)] = log_p[n, chosen]
        tail = np.delete(log_p[n], chosen[:exact])
        tails[n] = np.log(np.exp(tail).sum())
        powers = [np.exp(b * tail) for b in CURVE]
        curves[n] = [np.log(p.sum()) for p in powers] + [(p * tail).sum() / p.sum() for p in powers]
    return Record(
        sample_id=f"sample-{index:04d}",
        prompt_ids_P=rng.integers(2, VOCAB, prompt).astype(np.int32),
        response_ids_R=rng.integers(2, VOCAB, length).astype(np.int32),
        first_position=0,
        ids_NK=ids,
        logprobs_NK=logprobs.astype(np.float32) if selection.logprobs else None,
        draws_NK=draws if selection.draws else None,
        log_tail_N=tails.astype(np.float32),
        entropy_N=(-(np.exp(log_p) * log_p).sum(1)).astype(np.float32),
        curve_NJ=curves.astype(np.float32) if selection.logprobs else None,
        attention=_attention(rng, prompt, length + (max(prompt - 2, 0) if rows == "all" else 0), length),
    )


def _keep(
    log_p: NDArray[np.float64], selection: Selection, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Ids, how often each was drawn, and how many are exact."""
    order = np.argsort(-log_p, kind="stable")[: selection.k]
    if selection.kind == "adaptive":
        before = np.cumsum(np.exp(log_p[order])) - np.exp(log_p[order])
        order = order[(before < selection.mass) & (np.exp(log_p[order]) >= selection.floor)]
    tail = np.exp(log_p)
    tail[order] = 0
    drawn = np.bincount(rng.choice(VOCAB, selection.draws, p=tail / tail.sum()), minlength=VOCAB)
    more = np.flatnonzero(drawn)
    more = more[np.argsort(-(log_p[more] if selection.logprobs else drawn[more]), kind="stable")]
    return np.concatenate([order, more]), np.concatenate([np.zeros_like(order), drawn[more]]), len(order)


def _attention(rng: np.random.Generator, prompt: int, rows: int, responses: int) -> AttentionSummary:
    """Two layers; rows of the prompt first, each of which sees the keys up to its own."""
    positions = np.full((2, rows, TOP_M), -1, np.int32)
    weights = np.zeros((2, rows, TOP_M), np.float32)
    sink, mass, entropy = (np.zeros((2, rows), np.float32) for _ in range(3))
    for layer in range(2):
        for row in range(rows):
            seen = min(prompt, row + 2) if row < rows - responses else prompt
            raw = rng.dirichlet(np.full(seen + 1, 0.7))  # the last one is what the row pays to the response
            keys, kept = raw[1:seen], min(TOP_M, seen - 1)
            order = np.argsort(-keys, kind="stable")[:kept]
            positions[layer, row, :kept], weights[layer, row, :kept] = order + 1, keys[order]
            sink[layer, row], mass[layer, row] = raw[0], keys.sum()
            entropy[layer, row] = -(raw * np.log(raw + 1e-30)).sum()
    return AttentionSummary(
        positions_LNM=positions, weights_LNM=weights, sink_LN=sink, prompt_LN=mass, entropy_LN=entropy
    )


def without_prompt_rows(record: Record) -> Record:
    assert record.attention is not None
    names = [field.name for field in dataclasses.fields(record.attention)]
    cut = {name: getattr(record.attention, name)[:, -record.positions :] for name in names}
    return dataclasses.replace(record, attention=dataclasses.replace(record.attention, **cut))
