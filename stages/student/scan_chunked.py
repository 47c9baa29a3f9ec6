"""The liquid recurrence in chunks: matrix products inside a chunk, one state update between chunks, O(T).

Everything in a chunk is told in the frame of its middle: a query grows by the decay from the middle to its position, a
key by the decay from its position to the middle, and the state that comes in is carried to the middle. The frame
cancels out of every result, so it needs no gradient, and with log decays in [-5, 0] no exponent leaves [-40, 40],
which fp32 holds with room to spare. A chunk of 64 in one frame would overflow.

Shape suffixes, beside scan_naive's:
    N chunks   C positions of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16
SEGMENT = 1024
"""Positions whose temporaries an allocator keeps for the next segment. Those of a long sequence are so large that it
hands them back, and having the system map them anew cost over a third of the time at 8192."""


def _into_chunks(tensor_BTHX: Tensor) -> Tensor:
    """[B, T, H, X] to a view [N, B, H, C, X]."""
    batch, steps, heads, width = tensor_BTHX.shape
    return tensor_BTHX.reshape(batch, steps // CHUNK, CHUNK, heads, width).permute(1, 0, 3, 2, 4)


def _out_of_chunks(tensor_NBHCX: Tensor) -> Tensor:
    """[N, B, H, C, X] to [B, T, H, X]."""
    return tensor_NBHCX.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _add_product(sum_NBHXY: Tensor, left_NBHXZ: Tensor, right_NBHZY: Tensor) -> Tensor:
    """`sum` += left @ right, in place."""
    sum_NBHXY.flatten(0, 2).baddbmm_(left_NBHXZ.flatten(0, 2), right_NBHZY.flatten(0, 2))
    return sum_NBHXY


class _ChunkedScan(torch.autograd.Function):
    """The scan over whole chunks. `state[n]` is the state that enters chunk n, told at the chunk's middle:

    state[n + 1] = carry[n] * (state[n] + key[n]^T value[n]),   carry[n] = decay from middle n to middle n + 1,

    where the "middle" after the last chunk is its end, so that state[N] is the state that leaves the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BTHE: Tensor, key_BTHE: Tensor, value_BTHF: Tensor, log_decay_BTHE: Tensor, state_BHEF: Tensor
    ) -> tuple[Tensor, Tensor]:
        lower_CC = log_decay_BTHE.new_ones(CHUNK, CHUNK).tril_()
        elapsed_NBHCE = lower_CC @ _into_chunks(log_decay_BTHE)
        middle_NBH1E = elapsed_NBHCE[..., CHUNK // 2 - 1 : CHUNK // 2, :]
        log_carry_NBH1E = elapsed_NBHCE[..., -1:, :] - middle_NBH1E
        log_carry_NBH1E[:-1] += middle_NBH1E[1:]
        carry_NBHE1 = log_carry_NBH1E.mT.exp()
        to_first_BHE1 = middle_NBH1E[0].mT.exp()

        from_middle_NBHCE = (elapsed_NBHCE - middle_NBH1E).exp_()
        query_NBHCE = _into_chunks(query_BTHE) * from_middle_NBHCE
        key_NBHCE = _into_chunks(key_BTHE) / from_middle_NBHCE
        value_NBHCF = _into_chunks(value_BTHF).contiguous()

        chunks = elapsed_NBHCE.shape[0]
        state_NBHEF = state_BHEF.new_empty(chunks + 1, *state_BHEF.shape)
        torch.mul(state_BHEF, to_first_BHE1, out=state_NBHEF[0])
        torch.matmul(key_NBHCE.mT, value_NBHCF, out=state_NBHEF[1:])
        state_NBHEF[1:] *= carry_NBHE1
        for chunk in range(chunks):
            state_NBHEF[chunk + 1].addcmul_(state_NBHEF[chunk], carry_NBHE1[chunk])

        weight_NBHCC = (query_NBHCE @ key_NBHCE.mT).tril_()
        output_NBHCF = _add_product(weight_NBHCC @ value_NBHCF, query_NBHCE, state_NBHEF[:-1])
        ctx.save_for_backward(
            query_NBHCE,
            key_NBHCE,
            value_NBHCF,
            from_middle_NBHCE,
            weight_NBHCC,
            state_NBHEF,
            carry_NBHE1,
            to_first_BHE1,
        )
        return _out_of_chunks(output_NBHCF), state_NBHEF[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad_BTHF: Tensor, last_grad_BHEF: Tensor) -> tuple[Tensor, ...]:
        (
            query_NBHCE,
            key_NBHCE,
            value_NBHCF,
            from_middle_NBHCE,
            weight_NBHCC,
            state_NBHEF,
            carry_NBHE1,
            to_first_BHE1,
        ) = ctx.saved_tensors
        output_grad_NBHCF = _into_chunks(output_grad_BTHF).contiguous()

        # Gradients of the entering states, last to first: what the chunk reads of it, and what it leaves of it.
        state_grad_NBHEF = torch.empty_like(state_NBHEF)
        torch.matmul(query_NBHCE.mT, output_grad_NBHCF, out=state_grad_NBHEF[:-1])
        state_grad_NBHEF[-1] = last_grad_BHEF
        for chunk in reversed(range(carry_NBHE1.shape[0])):
            state_grad_NBHEF[chunk].addcmul_(state_grad_NBHEF[chunk + 1], carry_NBHE1[chunk])
        written_grad_NBHEF = state_grad_NBHEF[1:] * carry_NBHE1

        weight_grad_NBHCC = (output_grad_NBHCF @ value_NBHCF.mT).tril_()
        value_grad_NBHCF = _add_product(weight_NBHCC.mT @ output_grad_NBHCF, key_NBHCE, written_grad_NBHEF)
        query_grad_NBHCE = _add_product(weight_grad_NBHCC @ key_NBHCE, output_grad_NBHCF, state_NBHEF[:-1].mT)
        key_grad_NBHCE = _add_product(weight_grad_NBHCC.mT @ query_NBHCE, value_NBHCF, written_grad_NBHEF.mT)

        # A log decay scales what later positions read, unscales earlier writes, and scales what leaves the chunk.
        elapsed_grad_NBHCE = (query_NBHCE * query_grad_NBHCE).addcmul_(key_NBHCE, key_grad_NBHCE, value=-1)
        left_grad_NBH1E = (state_grad_NBHEF[1:] * state_NBHEF[1:]).sum(-1).unsqueeze(-2)
        upper_CC = weight_NBHCC.new_ones(CHUNK, CHUNK).triu_()
        log_decay_grad_NBHCE = (upper_CC @ elapsed_grad_NBHCE).add_(left_grad_NBH1E)
        return (
            _out_of_chunks(query_grad_NBHCE * from_middle_NBHCE),
            _out_of_chunks(key_grad_NBHCE / from_middle_NBHCE),
            _out_of_chunks(value_grad_NBHCF),
            _out_of_chunks(log_decay_grad_NBHCE),
            state_grad_NBHEF[0] * to_first_BHE1,
        )


def scan_chunked(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTHE: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `scan_naive`, with log decays that must lie in [-5, 0]. Differentiable once.

    A ragged end is filled with steps that neither decay nor write.
    """
    batch, steps, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    filled = (0, 0, 0, 0, 0, -steps % CHUNK)
    sequences = (query_BTHE, key_BTHE, value_BTHF, log_decay_BTHE)
    outputs = []
    for segment in zip(*(F.pad(tensor, filled).split(SEGMENT, 1) for tensor in sequences), strict=True):
        output_BTHF, state_BHEF = _ChunkedScan.apply(*segment, state_BHEF)
        outputs.append(output_BTHF)
    whole_BTHF = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return whole_BTHF[:, :steps], state_BHEF
