"""`signals.attention_heads_sum` as Triton kernels: no more than a tile of one head's scores exists at a time.

Two passes over the keys. The first finds the log partition of each row and head with an online softmax (Milakov and
Gimelshein, 2018); the second adds up the heads' probabilities tile by tile in registers. Memory sees [N, S] once, where
plain torch goes about seven times over [H, N, S]. Needs Triton, which comes with torch for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _KEYS = 64, 64
"""A tile; a product of Triton has at least 16 of each."""


@triton.jit
def _scores(queries, keys, row_n, key_s, rows, span, width, first_row, window, scale, query_row, key_row, WIDTH):
    """One head's scores of a tile: -inf where a row does not see a key."""
    d = tl.arange(0, WIDTH)
    there_n, there_s, there_d = row_n < rows, key_s < span, d < width
    query_nd = tl.load(
        queries + row_n.to(tl.int64)[:, None] * query_row + d[None, :],
        mask=there_n[:, None] & there_d[None, :],
        other=0.0,
    )
    key_ds = tl.load(
        keys + key_s.to(tl.int64)[None, :] * key_row + d[:, None], mask=there_s[None, :] & there_d[:, None], other=0.0
    )
    scores_ns = tl.dot(query_nd, key_ds, input_precision="ieee") * scale
    position_n = first_row + row_n
    seen_ns = (key_s[None, :] <= position_n[:, None]) & (key_s[None, :] > position_n[:, None] - window)
    return tl.where(seen_ns & there_s[None, :], scores_ns, float("-inf"))


@triton.jit
def _log_partitions(
    queries,
    keys,
    out_HN,
    rows,
    span,
    width,
    first_row,
    window,
    scale,
    group,
    query_row,
    query_head,
    key_row,
    key_head,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a tile of rows and one head, over all keys that they see."""
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    row_n = first + tl.arange(0, ROWS)
    queries += head * query_head
    keys += head // group * key_head
    highest_n = tl.full([ROWS], float("-inf"), tl.float32)
    sum_n = tl.zeros([ROWS], tl.float32)
    low = tl.maximum(first_row + first - window + 1, 0) // KEYS * KEYS
    high = tl.minimum(first_row + first + ROWS, span)
    for start in range(low, high, KEYS):
        key_s = start + tl.arange(0, KEYS)
        scores_ns = _scores(
            queries, keys, row_n, key_s, rows, span, width, first_row, window, scale, query_row, key_row, WIDTH
        )
        now_n = tl.maximum(highest_n, tl.max(scores_ns, axis=1))
        anchor_n = tl.where(now_n == float("-inf"), 0.0, now_n)
        sum_n = sum_n * tl.exp(highest_n - anchor_n) + tl.sum(tl.exp(scores_ns - anchor_n[:, None]), axis=1)
        highest_n = now_n
    tl.store(out_HN + head * rows + row_n, highest_n + tl.log(sum_n), mask=row_n < rows)


@triton.jit
def _heads_sum(
    queries,
    keys,
    partitions_HN,
    out_NS,
    rows,
    span,
    width,
    first_row,
    window,
    scale,
    heads,
    group,
    query_row,
    query_head,
    key_row,
    key_head,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a tile of rows and keys, over all heads. A tile that no row sees is zeros."""
    first, start = tl.program_id(0) * ROWS, tl.program_id(1) * KEYS
    row_n, key_s = first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    sum_ns = tl.zeros([ROWS, KEYS], tl.float32)
    if (start < first_row + first + ROWS) & (start + KEYS > first_row + first - window + 1):
        for head in range(heads):
            scores_ns = _scores(
                queries + head * query_head,
                keys + head // group * key_head,
                row_n,
                key_s,
                rows,
                span,
                width,
                first_row,
                window,
                scale,
                query_row,
                key_row,
                WIDTH,
            )
            partition_n = tl.load(partitions_HN + head * rows + row_n, mask=row_n < rows, other=0.0)
            sum_ns += tl.exp(scores_ns - partition_n[:, None])
    there_ns = (row_n[:, None] < rows) & (key_s[None, :] < span)
    tl.store(out_NS + row_n.to(tl.int64)[:, None] * span + key_s[None, :], sum_ns, mask=there_ns)


def attention_heads_sum(
    queries_NHd: Tensor, keys_SHd: Tensor, *, first_row: int, scale: float, window: int | None
) -> Tensor:
    """[N, S]: the function of `signals.attention_heads_sum`; what it allocates besides is a number a row and head."""
    (rows, heads, width), (span, key_heads, _) = queries_NHd.shape, keys_SHd.shape
    assert queries_NHd.stride(2) == keys_SHd.stride(2) == 1, "the channels of a head lie side by side"
    partitions_HN = queries_NHd.new_empty((heads, rows), dtype=torch.float32)
    sum_NS = queries_NHd.new_empty((rows, span), dtype=torch.float32)
    sight = (rows, span, width, first_row, first_row + rows if window is None else window, scale)
    strides = (*queries_NHd.stride()[:2], *keys_SHd.stride()[:2])
    tile = {"ROWS": _ROWS, "KEYS": _KEYS, "WIDTH": max(16, triton.next_power_of_2(width))}
    row_tiles, group = triton.cdiv(rows, _ROWS), heads // key_heads
    _log_partitions[row_tiles, heads](queries_NHd, keys_SHd, partitions_HN, *sight, group, *strides, **tile)
    _heads_sum[row_tiles, triton.cdiv(span, _KEYS)](
        queries_NHd, keys_SHd, partitions_HN, sum_NS, *sight, heads, group, *strides, **tile
    )
    return sum_NS
