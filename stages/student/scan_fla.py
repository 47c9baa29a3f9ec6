"""The scan by the kernels of flash-linear-attention, for tensors on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _kernel() -> Any:
    """The package needs a GPU's compiler to be imported at all, and an exported student must load where it is not."""
    if not torch.cuda.is_available():
        return None
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    return chunk_gla


_CHUNK_GLA = _kernel()
_LEAST_KEY_SIZE = 16


def fla_serves(query_BTHE: Tensor) -> bool:
    """Whether `scan_fla` can run on these tensors: the kernels multiply tiles of at least 16 channels, on a GPU."""
    return query_BTHE.is_cuda and _CHUNK_GLA is not None and query_BTHE.shape[-1] >= _LEAST_KEY_SIZE


def scan_fla(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTHE: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `scan_naive`. Differentiable once."""
    output_BTHF, state_BHEF = _CHUNK_GLA(
        query_BTHE, key_BTHE, value_BTHF, log_decay_BTHE, scale=1.0, initial_state=state_BHEF, output_final_state=True
    )
    return output_BTHF, state_BHEF
