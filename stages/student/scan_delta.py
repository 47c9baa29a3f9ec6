"""The delta recurrence S_t = e^g_t (I - e_t k_t k_t^T) S_(t-1) + w_t k_t v_t^T with |k_t| = 1, looped and in chunks.

Inside a chunk every step writes along its key, S_t = e^(G_t - G_0) S_0 + sum_i e^(G_t - G_i) k_i u_i^T, where G is the
running sum of g; what it writes there, u, solves a triangular system (Yang et al., Parallelizing Linear Transformers
with the Delta Rule). Decays are those of a head, so every exponent is a difference with G falling: none is above 0.

Shape suffixes: those of scan_chunked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def scan_delta_naive(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTH: Tensor,
    erased_BTH: Tensor,
    written_BTH: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down. Returns what q_t^T S_t reads, [B, T, H, F], and the last state."""
    batch, steps, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    outputs = []
    for step in range(steps):
        key_BH1E = key_BTHE[:, step, :, None]
        scale = (slice(None), step, slice(None), None, None)
        change_BH1F = written_BTH[scale] * value_BTHF[:, step, :, None] - (
            log_decay_BTH[scale].exp() * erased_BTH[scale] * (key_BH1E @ state_BHEF)
        )
        state_BHEF = log_decay_BTH[scale].exp() * state_BHEF + key_BH1E.mT * change_BH1F
        outputs.append((query_BTHE[:, step, :, None] @ state_BHEF).squeeze(-2))
    return torch.stack(outputs, 1), state_BHEF


def scan_delta_chunked(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTH: Tensor,
    erased_BTH: Tensor,
    written_BTH: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `scan_delta_naive`. A ragged end is filled with steps that neither decay, erase nor write."""
    batch, steps, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    query, key, value = (_into_chunks(tensor) for tensor in (query_BTHE, key_BTHE, value_BTHF))
    log_decay, erased, written = (
        _into_chunks(tensor[..., None]) for tensor in (log_decay_BTH, erased_BTH, written_BTH)
    )
    total_NBHC1 = log_decay.cumsum(-2)
    lower_CC = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).tril()
    between_NBHCC = (total_NBHC1 - total_NBHC1.mT).masked_fill(~lower_CC, float("-inf")).exp()

    # (I + overlap) u = written v - erased e^(G - G_0) k^T S_0, for both right-hand sides at once
    overlap_NBHCC = (erased * between_NBHCC * (key @ key.mT)).tril(-1)
    known = torch.cat([written * value, erased * total_NBHC1.exp() * key], -1)
    solved = torch.linalg.solve_triangular(overlap_NBHCC, known, upper=False, unitriangular=True)
    own_NBHCF, of_state_NBHCE = solved.split([value.shape[-1], key_size], -1)

    read_NBHCC = between_NBHCC * (query @ key.mT)
    of_start_NBHCE = total_NBHC1.exp() * query
    last_NBH11 = total_NBHC1[..., -1:, :]
    to_end_NBHCE = (last_NBH11 - total_NBHC1).exp() * key
    outputs = []
    for chunk in range(query.shape[0]):
        change_BHCF = own_NBHCF[chunk] - of_state_NBHCE[chunk] @ state_BHEF
        outputs.append(of_start_NBHCE[chunk] @ state_BHEF + read_NBHCC[chunk] @ change_BHCF)
        state_BHEF = last_NBH11[chunk].exp() * state_BHEF + to_end_NBHCE[chunk].mT @ change_BHCF
    output_BTHF = torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return output_BTHF[:, :steps], state_BHEF


def _into_chunks(tensor_BTHX: Tensor) -> Tensor:
    """[B, T, H, X] to [N, B, H, C, X], filled with zeros."""
    padded = F.pad(tensor_BTHX, (0, 0, 0, 0, 0, -tensor_BTHX.shape[1] % CHUNK))
    chunks_NBHCX: Tensor = padded.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4)
    return chunks_NBHCX
