"""The liquid recurrence in chunks: matrix products inside a chunk, one state update between chunks.

O(T) time, stable in fp32 for every log decay in [-5, 0]: blocks below the diagonal use exponents <= 0 only, and a
block on the diagonal is referenced to its middle, so that |exponent| <= 8 x 5. Shape suffixes, beside scan_naive's:
    N chunks   C positions of a chunk   M blocks of a chunk   c positions of a block
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
BLOCK = 16


class _CarryStates(torch.autograd.Function):
    """S_(n+1) = decay_n * S_n + written_n, with a backward that keeps the states and nothing else."""

    @staticmethod
    def forward(ctx: Any, written_BHNEF: Tensor, decay_BHNE1: Tensor, state_BHEF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state before each chunk [B, H, N, E, F] and the state after the last."""
        before_BHNEF = torch.empty_like(written_BHNEF)
        for chunk in range(written_BHNEF.shape[2]):
            before_BHNEF[:, :, chunk] = state_BHEF
            state_BHEF = torch.addcmul(written_BHNEF[:, :, chunk], state_BHEF, decay_BHNE1[:, :, chunk])
        ctx.save_for_backward(before_BHNEF, decay_BHNE1)
        return before_BHNEF, state_BHEF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before_grad_BHNEF, grad_BHEF = gradients
        before_BHNEF, decay_BHNE1 = ctx.saved_tensors
        written_grad_BHNEF = torch.empty_like(before_BHNEF)
        for chunk in reversed(range(before_BHNEF.shape[2])):
            written_grad_BHNEF[:, :, chunk] = grad_BHEF
            grad_BHEF = torch.addcmul(before_grad_BHNEF[:, :, chunk], grad_BHEF, decay_BHNE1[:, :, chunk])
        return written_grad_BHNEF, (written_grad_BHNEF * before_BHNEF).sum(-1, keepdim=True), grad_BHEF


def _into_chunks(tensor_BTHX: Tensor, padding: int, chunk: int) -> Tensor:
    """[B, T, H, X] to [B, H, N, C, X]. Zeros are appended: a step of no decay that writes nothing."""
    padded_BTHX = F.pad(tensor_BTHX, (0, 0, 0, 0, 0, padding)) if padding else tensor_BTHX
    return torch.unflatten(padded_BTHX, 1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _read_own_chunk(query_BHNCE: Tensor, key_BHNCE: Tensor, value_BHNCF: Tensor, elapsed_BHNCE: Tensor) -> Tensor:
    """What each position reads of the writes in its own chunk; `elapsed` is the log decay since the chunk's start."""

    def blocks(tensor_BHNCX: Tensor) -> Tensor:
        return torch.unflatten(tensor_BHNCX, -2, (-1, BLOCK))

    elapsed_BHNMcE = blocks(elapsed_BHNCE)
    middle_BHNM1E = elapsed_BHNMcE[..., BLOCK // 2 - 1 : BLOCK // 2, :]
    weight_BHNMcc = (blocks(query_BHNCE) * (elapsed_BHNMcE - middle_BHNM1E).exp()) @ (
        blocks(key_BHNCE) * (middle_BHNM1E - elapsed_BHNMcE).exp()
    ).transpose(-1, -2)
    on_diagonal_BHNCF = (weight_BHNMcc.tril() @ blocks(value_BHNCF)).flatten(-3, -2)

    parts = [on_diagonal_BHNCF[..., :BLOCK, :]]
    for start in range(BLOCK, query_BHNCE.shape[-2], BLOCK):
        block, earlier = slice(start, start + BLOCK), slice(0, start)
        at_start_BHN1E = elapsed_BHNCE[..., start - 1 : start, :]
        block_query_BHNcE = query_BHNCE[..., block, :] * (elapsed_BHNCE[..., block, :] - at_start_BHN1E).exp()
        earlier_key_BHNCE = key_BHNCE[..., earlier, :] * (at_start_BHN1E - elapsed_BHNCE[..., earlier, :]).exp()
        weight_BHNcC = block_query_BHNcE @ earlier_key_BHNCE.transpose(-1, -2)
        parts.append(on_diagonal_BHNCF[..., block, :] + weight_BHNcC @ value_BHNCF[..., earlier, :])
    return torch.cat(parts, -2)


def scan_chunked(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTHE: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `scan_naive`, with log decays that must lie in [-5, 0]."""
    batch, steps, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    chunk = min(CHUNK, -(-steps // BLOCK) * BLOCK)
    padding = -steps % chunk
    query_BHNCE, key_BHNCE, value_BHNCF, log_decay_BHNCE = (
        _into_chunks(tensor, padding, chunk) for tensor in (query_BTHE, key_BTHE, value_BTHF, log_decay_BTHE)
    )
    elapsed_BHNCE = log_decay_BHNCE.cumsum(-2)
    whole_BHN1E = elapsed_BHNCE[..., -1:, :]

    written_BHNEF = (key_BHNCE * (whole_BHN1E - elapsed_BHNCE).exp()).transpose(-1, -2) @ value_BHNCF
    before_BHNEF, state_BHEF = _CarryStates.apply(written_BHNEF, whole_BHN1E.exp().transpose(-1, -2), state_BHEF)

    output_BHNCF = _read_own_chunk(query_BHNCE, key_BHNCE, value_BHNCF, elapsed_BHNCE)
    output_BHNCF = output_BHNCF + (query_BHNCE * elapsed_BHNCE.exp()) @ before_BHNEF
    return output_BHNCF.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :steps], state_BHEF
