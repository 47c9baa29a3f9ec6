"""The decoder's layers: a liquid mixer over the response, cross-attention to the prompt, a gated feed-forward.

The mixer carries the order of the tokens, so the decoder has no positions.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .config import MiniCodformerConfig
from .layers import RMSNorm, SwiGLU, attend, key_bias, split_heads
from .ltc import LiquidMixer


class CrossAttention(nn.Module):
    """Attention to the encoder's output, with normalised queries and keys; keys and values are computed once."""

    def __init__(self, config: MiniCodformerConfig, layer_index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.layer_index = layer_index
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        encoder_BPD: Tensor,
        bias_B11P: Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        query_BHTE = self.query_norm(split_heads(self.query(hidden_BTD), self.heads))
        key_BHPE, value_BHPE = self._key_value(encoder_BPD, past_key_values)
        output_BTD, weights_BHTP = attend(query_BHTE, key_BHPE, value_BHPE, bias_B11P, need_weights=need_weights)
        return self.out(output_BTD), weights_BHTP

    def _key_value(self, encoder_BPD: Tensor, past_key_values: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        if past_key_values is not None and past_key_values.is_updated[self.layer_index]:
            layer = past_key_values.cross_attention_cache.layers[self.layer_index]
            return layer.keys, layer.values
        key, value = (split_heads(part, self.heads) for part in self.key_value(encoder_BPD).chunk(2, -1))
        key = self.key_norm(key)
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_index)
            past_key_values.is_updated[self.layer_index] = True
        return key, value


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiniCodformerConfig, layer_index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = LiquidMixer(config, layer_index)
        self.cross_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross = CrossAttention(config, layer_index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        hidden_BTD: Tensor,
        encoder_BPD: Tensor,
        real_BT: Tensor | None,
        encoder_real_BP: Tensor | None,
        bias_B11P: Tensor | None,
        need_weights: bool,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output and, if asked for, its cross-attention [B, H, T, P]."""
        self_cache = None if past_key_values is None else past_key_values.self_attention_cache
        hidden_BTD = hidden_BTD + self.mixer(
            self.mixer_norm(hidden_BTD), real_BT, self_cache, encoder_BPD, encoder_real_BP
        )
        crossed_BTD, weights_BHTP = self.cross(
            self.cross_norm(hidden_BTD), encoder_BPD, bias_B11P, past_key_values, need_weights
        )
        hidden_BTD = hidden_BTD + crossed_BTD
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD)), weights_BHTP


class MiniCodformerDecoder(nn.Module):
    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        encoder_BPD: Tensor,
        encoder_attention_mask: Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """`attention_mask` may reach back over tokens that are in the cache already: its last T columns count."""
        hidden_BTD = inputs_embeds
        real_BT = None if attention_mask is None else attention_mask[:, -hidden_BTD.shape[1] :].bool()
        encoder_real_BP = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        bias_B11P = key_bias(encoder_attention_mask, hidden_BTD.dtype)
        states, attentions = [hidden_BTD], []
        for layer in self.layers:
            hidden_BTD, weights_BHTP = layer(
                hidden_BTD,
                encoder_BPD,
                real_BT,
                encoder_real_BP,
                bias_B11P,
                output_attentions,
                past_key_values=past_key_values,
            )
            states.append(hidden_BTD)
            attentions.append(weights_BHTP)
        states[-1] = self.norm(hidden_BTD)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            cross_attentions=tuple(attentions) if output_attentions else None,
        )
