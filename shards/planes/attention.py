"""The attention cell.

With A keys in sight of a row, m = min(M, A) of them are kept:
- key positions are exact, as sets in an order of the keys that is the record's own: often kept ones first;
- the share of a key in its row's prompt mass is a step of 1/16 in sqrt(share), told as the difference from what the key
  has on average: |error of sqrt(share)| <= 1/32 before the shares are scaled down to sum to at most 1, or to exactly 1
  where every key is kept;
- masses are steps of 1/128 and entropies of 1/8 nat, as differences from the row before: |error| <= 1/256 and 1/16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shards.contract import AttentionSpec
from shards.errors import Corrupt
from shards.planes.id_sets import read_sets, set_stream
from shards.planes.numbers import Numbers, unzigzag, zigzag
from shards.planes.rans import Contexts, Reader, Stream
from shards.record import AttentionSummary

Float64 = NDArray[np.float64]

SHARE_STEPS, MASS_SCALE, ENTROPY_SCALE = 16, 128, 8
SHARE_BORDERS = (2, 4)
"""Shares are coded in three contexts, by what is usual for their key."""
LISTED = 3
"""A key is named in the order of its layer where it is kept so often; naming costs about a byte."""
_PAD = 1 << 24


def attention_streams(summary: AttentionSummary, sight_N: Numbers, prompt_length: int) -> Iterator[Stream]:
    """The streams of a valid summary, in their order."""
    layers, _, kept = summary.positions_LNM.shape
    sizes_N = np.minimum(sight_N, kept)
    there_LNM = np.broadcast_to(np.arange(kept) < sizes_N[:, None], summary.positions_LNM.shape)
    codes_LNM = _share_codes(summary.weights_LNM, summary.prompt_LN)
    ranks_LP, usual_LP = np.empty((2, layers, prompt_length), np.int32)
    listed, shares = [], []
    for layer in range(layers):
        keys, codes = summary.positions_LNM[layer][there_LNM[layer]], codes_LNM[layer][there_LNM[layer]]
        counts_P = np.bincount(keys, minlength=prompt_length)
        order = np.argsort(-counts_P, kind="stable")[: np.count_nonzero(counts_P >= LISTED)]
        means_P = np.rint(np.bincount(keys, codes, prompt_length) / np.maximum(counts_P, 1)).astype(np.int32)
        listed.append(order)
        shares.append(means_P[order])
        ranks_LP[layer], usual_LP[layer] = _orders(order, means_P[order], prompt_length)
    yield Stream("key-counts", np.array([len(order) for order in listed]))
    yield Stream("key-orders", np.concatenate(listed) - 1)
    yield Stream("key-shares", np.concatenate(shares))
    safe_LNM = np.where(there_LNM, summary.positions_LNM, 0)
    layer_L11 = np.arange(layers)[:, None, None]
    packed_LNM = np.where(there_LNM, ranks_LP[layer_L11, safe_LNM], _PAD) << 6 | codes_LNM
    packed_LNM.sort(axis=-1)
    ranks_LNM = packed_LNM >> 6
    yield set_stream("keys", ranks_LNM.reshape(-1, kept), np.tile(sizes_N, layers))
    keys_LNM = _in_order(ranks_LP)[layer_L11, np.minimum(ranks_LNM, prompt_length - 1)]
    usual, codes = usual_LP[layer_L11, keys_LNM][there_LNM], (packed_LNM & 63)[there_LNM]
    yield Stream("shares", zigzag(codes - usual), _share_contexts(usual))
    masses = np.concatenate([_steps(summary.sink_LN, MASS_SCALE), _steps(summary.prompt_LN, MASS_SCALE)])
    yield Stream("masses", masses)
    yield Stream("row-entropies", _steps(summary.entropy_LN, ENTROPY_SCALE))


def read_attention(reader: Reader, spec: AttentionSpec, sight_N: Numbers, prompt_length: int) -> AttentionSummary:
    """The inverse of `attention_streams`. Raises Corrupt."""
    layers, rows = len(spec.layers), len(sight_N)
    sizes_N = np.minimum(sight_N, spec.top_m)
    width = int(sizes_N.max(initial=0))
    keys_LP, usual_LP = _read_orders(reader, layers, prompt_length)
    sizes = np.tile(sizes_N, layers)
    there_LNM = (np.arange(width) < sizes[:, None]).reshape(layers, rows, width)
    layer_L11 = np.arange(layers)[:, None, None]
    ranks_LNM = read_sets(reader, "keys", sizes, prompt_length - 1).T.reshape(layers, rows, width)
    found_LNM = np.where(there_LNM, keys_LP[layer_L11, ranks_LNM], 0)
    if (found_LNM > sight_N[:, None]).any():
        raise Corrupt("a payload names an attention key that its row does not see")
    usual = usual_LP[layer_L11, found_LNM][there_LNM]
    codes = usual + unzigzag(reader.take("shares", len(usual), _share_contexts(usual)))
    codes_LNM = np.zeros(there_LNM.shape, np.int32)
    codes_LNM[there_LNM] = codes
    if codes.size and not 0 <= codes.min() <= codes.max() <= SHARE_STEPS:
        raise Corrupt(f"a payload names an attention share outside 0 to {SHARE_STEPS}")
    masses = reader.take("masses", 2 * layers * rows).reshape(2, layers, rows)
    sink_LN, prompt_LN = (_levels(part, MASS_SCALE, 1.0) for part in masses)
    entropy_LN = _levels(reader.take("row-entropies", layers * rows).reshape(layers, rows), ENTROPY_SCALE, 64.0)

    order_LNM = np.lexsort((found_LNM, -codes_LNM, ~there_LNM), axis=-1)
    codes_LNM = np.where(np.take_along_axis(there_LNM, order_LNM, -1), np.take_along_axis(codes_LNM, order_LNM, -1), 0)
    shares_LNM = _shares(codes_LNM, all_kept_N=sizes_N == sight_N)
    positions_LNM = np.full((layers, rows, spec.top_m), -1, np.int32)
    weights_LNM = np.zeros((layers, rows, spec.top_m), np.float32)
    positions_LNM[..., :width] = np.where(there_LNM, np.take_along_axis(found_LNM, order_LNM, -1), -1)
    weights_LNM[..., :width] = shares_LNM * prompt_LN[..., None]
    return AttentionSummary(
        positions_LNM=positions_LNM,
        weights_LNM=weights_LNM,
        sink_LN=sink_LN.astype(np.float32),
        prompt_LN=prompt_LN.astype(np.float32),
        entropy_LN=entropy_LN.astype(np.float32),
    )


def _orders(listed: NDArray[np.integer], shares: NDArray[np.integer], prompt_length: int) -> tuple[Numbers, Numbers]:
    """Rank and usual share of every key [P]; key 0 has none. Keys that are not listed follow by position."""
    others = np.setdiff1d(np.arange(1, prompt_length), listed)
    ranks_P, usual_P = np.zeros(prompt_length, np.int32), np.ones(prompt_length, np.int32)
    ranks_P[np.concatenate([listed, others]).astype(np.int64)] = np.arange(prompt_length - 1)
    usual_P[listed] = shares
    return ranks_P, usual_P


def _read_orders(reader: Reader, layers: int, prompt_length: int) -> tuple[Numbers, Numbers]:
    """Keys in order [L, P] (the last stands for none) and their usual shares [L, P]. Raises Corrupt."""
    counts_L = reader.take("key-counts", layers)
    if counts_L.max() >= prompt_length:
        raise Corrupt(f"a payload orders {counts_L.max()} attention keys of a prompt of {prompt_length} tokens")
    total, ends_L = int(counts_L.sum()), np.cumsum(counts_L)[:-1]
    listed = np.split(reader.take("key-orders", total) + 1, ends_L)
    shares = np.split(reader.take("key-shares", total), ends_L)
    ranks_LP, usual_LP = np.zeros((2, layers, prompt_length), np.int32)
    for layer in range(layers):
        if listed[layer].max(initial=0) >= prompt_length or len(np.unique(listed[layer])) < len(listed[layer]):
            raise Corrupt("a payload orders an attention key twice, or one outside the prompt")
        ranks_LP[layer], usual_LP[layer] = _orders(listed[layer], shares[layer], prompt_length)
    if usual_LP.max(initial=0) > SHARE_STEPS:
        raise Corrupt(f"a payload names an attention share outside 0 to {SHARE_STEPS}")
    return _in_order(ranks_LP), usual_LP


def _in_order(ranks_LP: Numbers) -> Numbers:
    """The key of each rank [L, P]; the last rank is that of no key."""
    keys_LP = np.zeros_like(ranks_LP)
    keys = np.broadcast_to(np.arange(1, ranks_LP.shape[1], dtype=np.int32), (len(ranks_LP), ranks_LP.shape[1] - 1))
    np.put_along_axis(keys_LP, ranks_LP[:, 1:].astype(np.int64), keys, axis=1)
    return keys_LP


def _share_contexts(usual: NDArray[np.integer]) -> Contexts:
    return np.digitize(usual, SHARE_BORDERS).astype(np.uint16)


def _share_codes(weights_LNM: NDArray[np.float32], prompt_LN: NDArray[np.float32]) -> Numbers:
    prompt_LN1 = prompt_LN[..., None].astype(np.float64)
    share_LNM = np.zeros(weights_LNM.shape)
    np.divide(weights_LNM, prompt_LN1, out=share_LNM, where=prompt_LN1 > 0)
    codes_LNM: Numbers = np.rint(SHARE_STEPS * np.sqrt(share_LNM.clip(0, 1))).astype(np.int32)
    return codes_LNM


def _shares(codes_LNM: Numbers, *, all_kept_N: NDArray[np.bool_]) -> Float64:
    shares_LNM: Float64 = (codes_LNM / SHARE_STEPS) ** 2
    total_LN1 = shares_LNM.sum(axis=-1, keepdims=True)
    exact_LN1 = np.where(total_LN1 > 0, total_LN1, 1)
    shares_LNM /= np.where(all_kept_N[:, None], exact_LN1, np.maximum(total_LN1, 1))
    return shares_LNM


def _steps(values_LN: NDArray[np.float32], scale: int) -> Numbers:
    """Differences of rounded values along each layer, folded."""
    rounded_LN = np.rint(values_LN.astype(np.float64) * scale).astype(np.int32)
    steps: Numbers = zigzag(np.diff(rounded_LN, axis=-1, prepend=0)).ravel().astype(np.int32)
    return steps


def _levels(numbers_LN: Numbers, scale: int, most: float) -> Float64:
    """The inverse of `_steps`. Raises Corrupt where a value lies outside 0 to `most`."""
    values_LN: Float64 = np.cumsum(unzigzag(numbers_LN), axis=-1, dtype=np.int64) / scale
    if values_LN.size and not 0 <= values_LN.min() <= values_LN.max() <= most:
        raise Corrupt(f"a payload names a mass or an entropy outside 0 to {most}")
    return values_LN
