"""Learning the tables from records like those that will be written.

- Classes of positions are found by clustering which ids are kept together (a mixture of independent Bernoulli
  variables, each position given to its likeliest component); each orders the vocabulary by how often it keeps an id.
- Codes are learnt from the streams that the codec makes with these orders.
- The same records give the same tables, under one version of the libraries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.planes.codec import Planes3
from shards.planes.levels import steps_for
from shards.planes.numbers import to_symbols
from shards.planes.rans import Code, learn_frequencies
from shards.planes.tables import KINDS, MAX_CLASSES, Tables, fingerprint, plain_tables
from shards.record import Record

ROUNDS = 12
POSITIONS_A_CLASS = 1_000
"""Fewer cannot teach a class."""
CLUSTERED = 16_384
"""Positions that the classes are found from; orders are counted over all."""
PRIOR = 16.0
"""How many positions' worth of the whole's frequencies a class begins with."""
NEAR = 4
"""How far from a symbol that was seen others must be expected."""
OTHERS = 4
"""So many numbers of a kind's other contexts are expected in each."""
BYTES_AN_ID = 2.0
"""About what a listed id takes in the tables."""


def learn_tables(records: Sequence[Record], contract: Contract, *, budget: int = 1 << 16) -> bytes:
    """Tables of about `budget` bytes at most, for records under this contract, whatever its `tables` says.

    With no records, tables that say nothing: ids by number, no codes.
    """
    tables = plain_tables(contract.vocab_size, steps_for(_mean_head(records, contract.selection.k)))
    if records:
        tables = _with_orders(records, tables, budget)
        tables = dataclasses.replace(tables, codes=_codes(records, contract, tables))
    return tables.to_bytes()


def _mean_head(records: Sequence[Record], k: int) -> float:
    """Ids that the exact head of a position has on average; k where there are no records."""
    sizes = [(record.ids_NK[:, :k] >= 0).sum(axis=1) for record in records]
    return float(np.concatenate(sizes).mean()) if records and k else k


def _with_orders(records: Sequence[Record], plain: Tables, budget: int) -> Tables:
    vocab_size = plain.vocab_size
    sizes_N = np.concatenate([(record.ids_NK >= 0).sum(axis=1) for record in records])
    ids, count = np.concatenate([record.ids_NK[record.ids_NK >= 0] for record in records]), len(sizes_N)
    positions = np.repeat(np.arange(count), sizes_N)
    overall_V = (np.bincount(ids, minlength=vocab_size) + 0.1) / (count + 1)
    classes = max(1, min(MAX_CLASSES, count // POSITIONS_A_CLASS))
    labels_N = np.zeros(count, np.int64)
    if classes > 1:
        weights_CV, bias_C = _components(ids, positions, count, overall_V, classes)
        labels_N = _likeliest(ids, positions, count, weights_CV, bias_C)
    counts_CV = _counts(labels_N[positions], ids, classes, vocab_size)
    common, leading = _listed(overall_V, counts_CV, budget)
    return dataclasses.replace(plain, common=common, leading=leading)


def _components(
    ids: NDArray[np.int32], positions: NDArray[np.int64], count: int, overall_V: NDArray[np.float64], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log odds of each id [C, V] and bias [C] of components found from evenly spread positions."""
    step = max(1, count // CLUSTERED)
    chosen = positions % step == 0
    ids, positions = ids[chosen], positions[chosen] // step
    count = (count + step - 1) // step
    labels_N = np.random.default_rng(0).integers(0, classes, count)
    for _ in range(ROUNDS):
        sizes_C1 = np.bincount(labels_N, minlength=classes)[:, None]
        kept_CV = _counts(labels_N[positions], ids, classes, len(overall_V))
        odds_CV = ((kept_CV + PRIOR * overall_V) / (sizes_C1 + PRIOR)).clip(1e-7, 1 - 1e-6)
        bias_C = np.log1p(-odds_CV).sum(axis=1).astype(np.float32)
        weights_CV = (np.log(odds_CV) - np.log1p(-odds_CV)).astype(np.float32)
        labels_N = _likeliest(ids, positions, count, weights_CV, bias_C)
    return weights_CV, bias_C


def _likeliest(
    ids: NDArray[np.int32],
    positions: NDArray[np.int64],
    count: int,
    weights_CV: NDArray[np.float32],
    bias_C: NDArray[np.float32],
) -> NDArray[np.int64]:
    scores = [np.bincount(positions, weights_V[ids], minlength=count) for weights_V in weights_CV]
    labels_N: NDArray[np.int64] = (np.stack(scores, axis=1) + bias_C).argmax(axis=1)
    return labels_N


def _counts(labels: NDArray[np.int64], ids: NDArray[np.int32], classes: int, vocab_size: int) -> NDArray[np.int64]:
    flat = np.bincount(labels * vocab_size + ids, minlength=classes * vocab_size)
    return flat.reshape(classes, vocab_size)


def _listed(
    overall_V: NDArray[np.float64], counts_CV: NDArray[np.int64], budget: int
) -> tuple[NDArray[np.int32], tuple[NDArray[np.int32], ...]]:
    """The ids that lead every order, and those that lead each: half of the budget for either."""
    listed = int(budget / BYTES_AN_ID) // 2
    common = _falling(overall_V)[:listed]
    leading = []
    for counts_V in counts_CV:
        lead = _falling(counts_V + PRIOR * overall_V)[: listed // len(counts_CV)]
        leading.append(lead[counts_V[lead] > 0])
    return common[counts_CV.sum(axis=0)[common] > 0], tuple(leading)


def _falling(counts_V: NDArray[np.number]) -> NDArray[np.int32]:
    """Ids by falling count, equal ones by rising id."""
    return np.argsort(-counts_V, kind="stable").astype(np.int32)


def _codes(records: Sequence[Record], contract: Contract, tables: Tables) -> dict[str, Code]:
    data = tables.to_bytes()
    codec = Planes3(dataclasses.replace(contract, tables=fingerprint(data)), data)
    counts = {kind: np.zeros(256 * contexts, np.int64) for kind, contexts in KINDS.items()}
    for record in records:
        attention = () if contract.attention is None else codec.attention_streams(record)
        for kind, numbers, contexts in chain(codec.signal_streams(record), attention):
            symbols = to_symbols(numbers)[0] + 256 * np.asarray(contexts, np.int64)
            counts[kind] += np.bincount(symbols, minlength=len(counts[kind]))
    return {kind: _frequencies(found.reshape(-1, 256)) for kind, found in counts.items()}


def _frequencies(counts_C: NDArray[np.int64]) -> Code:
    """Those of a kind's contexts, each as if a few numbers of the others had been seen in it; none without numbers.

    Neighbours of whatever was seen in any context are possible in each, and so are large numbers.
    """
    whole, scale = counts_C.sum(axis=0), 16
    near = np.convolve(whole > 0, np.ones(2 * NEAR + 1), "same") > 0
    shared = np.ceil(scale * OTHERS * whole / max(1, whole.sum())) + near
    codes = [learn_frequencies(scale * counts + shared) if counts.any() else np.zeros(256) for counts in counts_C]
    return np.stack(codes).astype(np.uint16)
