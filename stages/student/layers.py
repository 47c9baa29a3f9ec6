"""What encoder and decoder have in common: normalisation, the gated feed-forward and the attention itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MiniCodformerConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x), with gate and up in one product."""

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_BTD).chunk(2, -1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


def split_heads(hidden_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, D] to [B, H, T, D / H]."""
    return hidden_BTD.reshape(*hidden_BTD.shape[:-1], heads, -1).transpose(1, 2)


def key_bias(mask_BP: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask over keys (1 at tokens, 0 at padding) as a term of the attention scores, [B, 1, 1, P]."""
    if mask_BP is None:
        return None
    padding_B11P = mask_BP[:, None, None].eq(0)
    return torch.zeros_like(padding_B11P, dtype=dtype).masked_fill_(padding_B11P, float("-inf"))


def attend(
    query_BHTE: Tensor, key_BHPE: Tensor, value_BHPE: Tensor, bias_B11P: Tensor | None, *, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; `bias` is what `key_bias` makes of the keys' mask.

    Returns the heads' outputs side by side [B, T, D] and, if asked for, the weights [B, H, T, P].
    """
    weights_BHTP = None
    if need_weights:
        scores_BHTP = (query_BHTE * query_BHTE.shape[-1] ** -0.5) @ key_BHPE.transpose(-1, -2)
        if bias_B11P is not None:
            scores_BHTP = scores_BHTP + bias_B11P
        weights_BHTP = scores_BHTP.softmax(-1, dtype=torch.float32)
        output_BHTE = weights_BHTP.to(value_BHPE.dtype) @ value_BHPE
    else:
        output_BHTE = F.scaled_dot_product_attention(query_BHTE, key_BHPE, value_BHPE, attn_mask=bias_B11P)
    return output_BHTE.transpose(1, 2).flatten(-2), weights_BHTP


class TokenEmbedding(nn.Embedding):
    """Ids to hidden vectors, through `embedding_rank` columns where the embedding is factorised.

    There is no padding row: what is padding is known from masks, and every row can be learnt.
    """

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config.vocab_size, config.embedding_size)
        factorised = config.embedding_rank is not None
        self.widen = nn.Linear(config.embedding_size, config.hidden_size, bias=False) if factorised else None

    def forward(self, ids: Tensor) -> Tensor:
        embedded = super().forward(ids)
        return embedded if self.widen is None else self.widen(embedded)
