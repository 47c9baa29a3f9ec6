"""Draws from what a teacher gives to the ids outside its exact head: inverse transform sampling over the vocabulary.

- A draw depends on the seed, the sample's id, the position and its number alone, so that any replica draws the same.
- The running sum of 150,000 terms in single precision would deny the rarest ids their share: it is formed in double
  precision, over blocks and then within the one block that a draw fell into.
- A vocabulary may be split: a shard answers for the draws that fall into its part of the mass, and says 0 for others.

Shape suffixes as in `shards.record`; besides, D is the number of draws a position and C that of blocks.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
"""Columns of the vocabulary whose sum of powers is told apart."""
_CELLS = 2**20
"""Powers formed at once to look into the blocks that draws fell into."""
_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers."""


def draw_key(seed: int, sample_id: str) -> int:
    """What tells a sample's draws from those of any other; 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\\0{sample_id}".encode()).digest()[:8]) >> 1


def position_keys(key: int, positions_N: Tensor) -> Tensor:
    """[N] int64: one key a position of a sample."""
    return _mixed(positions_N * _GOLDEN + key)


def uniforms(keys_N: Tensor, draws: int) -> Tensor:
    """[N, D] float64 in [0, 1), a function of each key and the draw's number."""
    numbers_D = torch.arange(1, draws + 1, device=keys_N.device)
    bits_ND = _mixed(keys_N[:, None] + numbers_D * _GOLDEN)
    return _shifted(bits_ND, 11).double() * 2.0**-53


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps around."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros, which >> on signed numbers does not."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def block_masses(logits_NV: Tensor, reference_N: Tensor) -> Tensor:
    """[N, C] float64: e^(logit - reference) summed over blocks of the vocabulary."""
    power_NV = (logits_NV - reference_N[:, None]).exp_()
    whole = power_NV.shape[1] // BLOCK * BLOCK
    masses_NC = power_NV[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1, dtype=torch.float64)
    rest_N1 = power_NV[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64)
    return torch.cat([masses_NC, rest_N1], dim=-1)


def drawn_columns(logits_NV: Tensor, reference_N: Tensor, masses_NC: Tensor, targets_ND: Tensor) -> Tensor:
    """[N, D]: the columns in which the running sum of e^(logit - reference) passes the targets.

    `masses_NC` are this shard's `block_masses`; targets lie in [0, their sum), those beyond are as if just below it.
    """
    step = max(1, _CELLS // (targets_ND.shape[1] * BLOCK))
    parts = (tensor.split(step) for tensor in (logits_NV, reference_N, masses_NC, targets_ND))
    return torch.cat([_drawn_at_once(*block) for block in zip(*parts, strict=True)])


def _drawn_at_once(logits_NV: Tensor, reference_N: Tensor, masses_NC: Tensor, targets_ND: Tensor) -> Tensor:
    sums_NC = masses_NC.cumsum(dim=-1)
    targets_ND = _below(targets_ND, sums_NC[:, -1:])
    blocks_ND = torch.searchsorted(sums_NC, targets_ND, right=True)
    rest_ND = targets_ND - pad(sums_NC, (1, 0)).gather(1, blocks_ND)
    columns_NDB = blocks_ND[..., None] * BLOCK + torch.arange(BLOCK, device=logits_NV.device)
    outside_NDB = columns_NDB >= logits_NV.shape[1]
    block_NDB = logits_NV.gather(1, columns_NDB.flatten(1).clamp_(max=logits_NV.shape[1] - 1)).view_as(columns_NDB)
    power_NDB = (block_NDB - reference_N[:, None, None]).exp_().masked_fill_(outside_NDB, 0.0)
    within_NDB = power_NDB.cumsum(dim=-1, dtype=torch.float64)
    inside_ND1 = _below(rest_ND[..., None], within_NDB[..., -1:])
    return blocks_ND * BLOCK + torch.searchsorted(within_NDB, inside_ND1, right=True)[..., 0]


def _below(targets: Tensor, sums: Tensor) -> Tensor:
    """Targets below a sum that rounding may have left under them."""
    return torch.minimum(targets, sums.nextafter(torch.zeros_like(sums)))


def tally(ids_ND: Tensor, logits_ND: Tensor, *, by_count: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids [N, D], their logits and how often each was drawn, padded with -1, -inf and 0.

    By falling logit, or by falling count; equal ones by rising id.
    """
    order_ND = ids_ND.argsort(dim=-1)
    ids_ND, logits_ND = ids_ND.gather(1, order_ND), logits_ND.gather(1, order_ND)
    first_ND = pad(ids_ND[:, 1:] != ids_ND[:, :-1], (1, 0), value=True)
    slots_ND = first_ND.cumsum(dim=-1) - 1
    counts_ND = torch.zeros_like(ids_ND).scatter_add_(1, slots_ND, torch.ones_like(ids_ND))
    distinct_ND = torch.full_like(ids_ND, -1).scatter_(1, slots_ND, ids_ND)
    values_ND = torch.full_like(logits_ND, -torch.inf).scatter_(1, slots_ND, logits_ND)
    rank_ND = counts_ND if by_count else values_ND
    order_ND = rank_ND.sort(dim=-1, descending=True, stable=True).indices
    return distinct_ND.gather(1, order_ND), values_ND.gather(1, order_ND), counts_ND.gather(1, order_ND)
