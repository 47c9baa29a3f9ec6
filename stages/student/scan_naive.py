"""The liquid recurrence as it is written down: one step after another. The oracle, and the step of decoding.

Shape suffixes of the scans, beside the house's B T H:
    E key channels of a head   F value channels of a head
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_naive(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTHE: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run S_t = diag(exp g_t) S_(t-1) + k_t v_t^T and read o_t = q_t^T S_t.

    `key` already carries the share of the step that is written. Returns the outputs [B, T, H, F] and the last state.
    """
    batch, _, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    outputs = []
    for query_BHE, key_BHE, value_BHF, log_decay_BHE in zip(
        query_BTHE.unbind(1), key_BTHE.unbind(1), value_BTHF.unbind(1), log_decay_BTHE.unbind(1), strict=True
    ):
        written_BHEF = key_BHE.unsqueeze(-1) * value_BHF.unsqueeze(-2)
        state_BHEF = torch.addcmul(written_BHEF, log_decay_BHE.exp().unsqueeze(-1), state_BHEF)
        outputs.append((query_BHE.unsqueeze(-2) @ state_BHEF).squeeze(-2))
    return torch.stack(outputs, 1), state_BHEF
