"""Records of every selection from whole distributions, by the definitions and position by position."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from shards.contract import AttentionSpec, Contract, Selection
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import fingerprint
from shards.record import AttentionSummary, Record

SELECTIONS = (
    Selection(kind="topk", k=6),
    Selection(kind="topk", k=5, tail_known=False),
    Selection(kind="adaptive", k=9, mass=0.8, floor=0.01),
    Selection(kind="hybrid", k=3, draws=8),
    Selection(kind="sample", draws=12),
    Selection(kind="sample", draws=12, logprobs=False),
)


def contract_of(selection: Selection, *, vocab_size: int = 300, **fields: object) -> Contract:
    """A contract of the codec "planes/3"; its tables are still to be learnt."""
    given = {
        "codec": "planes/3",
        "teacher": "t",
        "teacher_fingerprint": "1",
        "tokenizer_fingerprint": "2",
        "vocab_size": vocab_size,
        "start_token_id": 0,
        "end_token_id": 0,
        "selection": selection,
        "attention": None,
        "corpus_fingerprint": "3",
        "engine": "synthetic 1",
        "dtype": "float32+float32",
    }
    return Contract(**(given | fields))  # type: ignore[arg-type]


def learnt(contract: Contract, records: list[Record]) -> tuple[Contract, bytes]:
    """The contract with tables that these records teach, and those tables."""
    tables = learn_tables(records, contract)
    return dataclasses.replace(contract, tables=fingerprint(tables)), tables


def distributions(rng: np.random.Generator, positions: int, vocab_size: int, scale: float | None = None) -> np.ndarray:
    """Log-probabilities [N, V]: flat and sharp ones, low ids likelier, ties common; some have probabilities of 0."""
    scale_N1 = rng.choice([0.3, 2.0, 8.0], (positions, 1)) if scale is None else scale
    logits_NV = rng.standard_normal((positions, vocab_size)) * scale_N1 - np.log1p(np.arange(vocab_size))
    if rng.random() < 0.3:
        logits_NV = np.round(logits_NV)
    if vocab_size > 2 and rng.random() < 0.2:
        logits_NV[:, vocab_size // 2 :] = -np.inf
    return logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)


def record_of(
    contract: Contract, rng: np.random.Generator, *, positions: int = 5, prompt: int = 6, name: str = "a"
) -> Record:
    """What a teacher with random distributions gives under a contract."""
    logprobs_NV = distributions(rng, positions, contract.vocab_size)
    return kept_of(contract, logprobs_NV, rng, prompt=prompt, name=name)


def kept_of(
    contract: Contract, logprobs_NV: np.ndarray, rng: np.random.Generator, *, prompt: int = 6, name: str = "a"
) -> Record:
    """What of whole distributions a contract keeps."""
    selection, positions = contract.selection, len(logprobs_NV)
    rows = [_position(selection, contract.curve, row, rng) for row in logprobs_NV]
    width = max(len(row[0]) for row in rows)
    padded = [
        np.array([[*row[part], *[fill] * (width - len(row[part]))] for row in rows])
        for part, fill in ((0, -1), (1, -np.inf), (2, 0))
    ]
    entropy_N = -(np.exp(logprobs_NV) * np.maximum(logprobs_NV, -1e4)).sum(axis=1)
    unknown_N = np.full(positions, np.nan, np.float32)
    return Record(
        sample_id=name,
        prompt_ids_P=rng.integers(0, contract.vocab_size, prompt, np.int32),
        response_ids_R=labels_of(logprobs_NV, rng),
        first_position=0,
        ids_NK=padded[0].astype(np.int32),
        logprobs_NK=padded[1].astype(np.float32) if selection.logprobs else None,
        draws_NK=padded[2].astype(np.int32) if selection.draws else None,
        log_tail_N=np.array([row[3] for row in rows], np.float32) if selection.tail_known else unknown_N,
        entropy_N=entropy_N.astype(np.float32) if selection.tail_known else unknown_N,
        curve_NJ=np.array([row[4] for row in rows], np.float32) if contract.curve else None,
        attention=None if contract.attention is None else attention_of(contract.attention, rng, positions, prompt),
    )


def labels_of(logprobs_NV: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What followed: most of it drawn from the distributions, some of it unlikely."""
    drawn = [rng.choice(len(row), p=np.exp(row) / np.exp(row).sum()) for row in logprobs_NV]
    anything_N = rng.integers(0, logprobs_NV.shape[1], len(drawn))
    return np.where(rng.random(len(drawn)) < 0.7, drawn, anything_N).astype(np.int32)


def _position(
    selection: Selection, curve: tuple[float, ...], logprobs_V: np.ndarray, rng: np.random.Generator
) -> tuple[list[int], list[float], list[int], float, list[float]]:
    """Ids, log-probabilities, counts, log tail and curve of one position."""
    order = [v for v in np.lexsort((np.arange(len(logprobs_V)), -logprobs_V)).tolist() if logprobs_V[v] > -np.inf]
    if selection.kind in ("topk", "hybrid"):
        # A fixed k needs k ids; a float32 has no zero probability to give, so the least stands in for it.
        zeros = [v for v in range(len(logprobs_V)) if logprobs_V[v] == -np.inf]
        head = (order + zeros)[: selection.k]
    elif selection.kind == "adaptive":
        before = itertools.accumulate((float(np.exp(logprobs_V[v])) for v in order), initial=0.0)
        wanted = [v for v, mass in zip(order, before, strict=False) if mass < selection.mass]
        head = [wanted[0], *(v for v in wanted[1:] if np.exp(logprobs_V[v]) >= selection.floor)][: selection.k]
    else:
        head = []
    held = set(head)
    tail = [v for v in order if v not in held]
    log_tail = float(np.logaddexp.reduce(logprobs_V[tail])) if tail else -np.inf
    drawn: dict[int, int] = {}
    if tail and selection.draws:
        shares = np.exp(logprobs_V[tail] - log_tail)
        for v in rng.choice(tail, selection.draws, p=shares / shares.sum()).tolist():
            drawn[v] = drawn.get(v, 0) + 1
    first = {v: (-logprobs_V[v] if selection.logprobs else -count) for v, count in drawn.items()}
    ids = [*head, *sorted(drawn, key=lambda v: (first[v], v))]
    values = [max(float(logprobs_V[v]), -80.0) for v in ids]
    powers = [float(np.logaddexp.reduce(b * logprobs_V[tail])) if tail else -np.inf for b in curve]
    slopes = [
        float((np.exp(b * logprobs_V[tail] - power) * logprobs_V[tail]).sum()) if tail else 0.0
        for b, power in zip(curve, powers, strict=True)
    ]
    return ids, values, [drawn.get(v, 0) for v in ids], log_tail, [*powers, *slopes]


def attention_of(spec: AttentionSpec, rng: np.random.Generator, positions: int, prompt: int) -> AttentionSummary:
    """Random head-mean rows and what a summary keeps of them."""
    sights = [prompt - 1] * positions
    if spec.rows == "all":
        sights = [*range(1, prompt - 1), *sights]
    shape = (len(spec.layers), len(sights))
    positions_LNM, weights_LNM = np.full((*shape, spec.top_m), -1, np.int32), np.zeros((*shape, spec.top_m), np.float32)
    scalars = np.zeros((3, *shape), np.float32)
    sharpness = rng.choice([0.02, 0.3, 5.0])
    for layer, (row, sight) in itertools.product(range(len(spec.layers)), enumerate(sights)):
        row_S = rng.dirichlet(np.full(prompt + 2, sharpness))
        if rng.random() < 0.1:
            row_S[1:prompt] = 0
        row_S[sight + 1 : prompt] = 0
        keys = sorted(range(1, sight + 1), key=lambda key: (-row_S[key], key))[: spec.top_m]
        positions_LNM[layer, row, : len(keys)], weights_LNM[layer, row, : len(keys)] = keys, row_S[keys]
        safe = row_S[row_S > 0]
        scalars[:, layer, row] = row_S[0], row_S[1 : sight + 1].sum(), -(safe * np.log(safe)).sum()
    return AttentionSummary(
        positions_LNM=positions_LNM,
        weights_LNM=weights_LNM,
        sink_LN=scalars[0],
        prompt_LN=scalars[1],
        entropy_LN=scalars[2],
    )
