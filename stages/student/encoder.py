"""The encoder: a bidirectional Transformer over the prompt.

Positions count real tokens only, so where a batch puts its padding changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .config import MiniCodformerConfig
from .layers import RMSNorm, SwiGLU, TokenEmbedding, attend, key_bias, split_heads


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al., RoFormer)."""

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.pairs = config.head_size // 2

    def forward(self, position_BP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [B, 1, P, head size / 2]."""
        frequency = self.theta ** (-torch.arange(self.pairs, device=position_BP.device) / self.pairs)
        angle = position_BP[:, None, :, None] * frequency
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(heads_BHPE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel i of a head together with channel i + E/2."""
    cosine, sine = rotary
    first, second = heads_BHPE.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def forward(
        self, hidden_BPD: Tensor, bias_B11P: Tensor | None, rotary: tuple[Tensor, Tensor], need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.heads) for part in self.query_key_value(hidden_BPD).chunk(3, -1))
        query, key = rotate(self.query_norm(query), rotary), rotate(self.key_norm(key), rotary)
        output_BPD, weights_BHPP = attend(query, key, value, bias_B11P, need_weights=need_weights)
        return self.out(output_BPD), weights_BHPP


class EncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, hidden_BPD: Tensor, bias_B11P: Tensor | None, rotary: tuple[Tensor, Tensor], need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended_BPD, weights_BHPP = self.attention(self.attention_norm(hidden_BPD), bias_B11P, rotary, need_weights)
        hidden_BPD = hidden_BPD + attended_BPD
        return hidden_BPD + self.mlp(self.mlp_norm(hidden_BPD)), weights_BHPP


class MiniCodformerEncoder(nn.Module):
    """Embeds a prompt and encodes it. Its embedding is the model's: decoder and output layer use it too."""

    main_input_name = "input_ids"

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config)
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        hidden_BPD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            position_BP = torch.arange(hidden_BPD.shape[1], device=hidden_BPD.device)[None]
        else:
            position_BP = attention_mask.long().cumsum(-1) - 1
        bias_B11P = key_bias(attention_mask, hidden_BPD.dtype)
        rotary = self.rotary(position_BP, hidden_BPD.dtype)
        states, attentions = [hidden_BPD], []
        for layer in self.layers:
            hidden_BPD, weights_BHPP = layer(hidden_BPD, bias_B11P, rotary, output_attentions)
            states.append(hidden_BPD)
            attentions.append(weights_BHPP)
        states[-1] = self.norm(hidden_BPD)
        return BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
