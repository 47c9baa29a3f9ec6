"""The top k of rows as wide as a vocabulary, in about one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
"""Logits a block in the preselection of the top k. One pass of block maxima and a top-k over k blocks costs about
two thirds of `torch.topk` at a vocabulary of 49,152 on one core; 32 and 128 are no faster."""


def select_topk(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row by falling value, and their columns; equal values by rising column.

    Exact: if an element of the top k lay outside the k blocks with the largest maxima, each of those k blocks would
    hold an element at least as large.
    """
    rows, width = logits_NV.shape
    blocks = width // _BLOCK
    if blocks <= k:
        return _by_value_then_column(*torch.topk(logits_NV, k, dim=-1))
    body = logits_NV[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    chosen_NK = body.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    candidates = body.gather(1, chosen_NK[:, :, None].expand(-1, -1, _BLOCK)).view(rows, k * _BLOCK)
    candidates = torch.cat([candidates, logits_NV[:, blocks * _BLOCK :]], dim=-1)
    values_NK, where_NK = candidates.topk(k, dim=-1)
    block = chosen_NK.gather(1, (where_NK // _BLOCK).clamp(max=k - 1))
    inside = block * _BLOCK + where_NK % _BLOCK
    behind = where_NK - k * _BLOCK + blocks * _BLOCK
    return _by_value_then_column(values_NK, torch.where(where_NK < k * _BLOCK, inside, behind))


def _by_value_then_column(values_NK: Tensor, columns_NK: Tensor) -> tuple[Tensor, Tensor]:
    order = columns_NK.argsort(dim=-1)
    values_NK, columns_NK = values_NK.gather(-1, order), columns_NK.gather(-1, order)
    values_NK, order = values_NK.sort(dim=-1, descending=True, stable=True)
    return values_NK, columns_NK.gather(-1, order)
