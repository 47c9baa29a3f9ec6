"""The student one token at a time, many answers side by side: prompts encoded once, states of fixed size a row.

Rows join and leave between any two steps. A row is the recurrent memory and the last inputs of the convolution of
each layer, and the keys and values of its prompt, which no row copies and several may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.student.decoder import DecoderLayer
from stages.student.layers import split_heads
from stages.student.ltc import LiquidMixer
from stages.student.model import MiniCodformerForConditionalGeneration as Model


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Cross-attention keys and values of one prompt, [L, 1, H, P, E] each, and the state that it primes."""

    keys: Tensor
    values: Tensor
    memories_LHEF: Tensor

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.memories_LHEF.nbytes


@dataclass(slots=True)
class DecoderState:
    """Rows that are decoded together."""

    windows_LBKD: Tensor
    memories_LBHEF: Tensor
    prompts: list[EncodedPrompt]

    def __len__(self) -> int:
        return len(self.prompts)


@torch.inference_mode()
def encode(model: Model, prompts: Sequence[Sequence[int]]) -> list[EncodedPrompt]:
    """Encode prompts of any lengths; none may be empty."""
    encoded = []
    for prompt in prompts:
        ids_1P = torch.tensor([prompt], device=model.device)
        hidden_1PD = model.model.encoder(ids_1P).last_hidden_state
        keys, values, memories = [], [], []
        for layer in _layers(model):
            cross = layer.cross
            key, value = (split_heads(part, cross.heads) for part in cross.key_value(hidden_1PD).chunk(2, -1))
            keys.append(cross.key_norm(key))
            values.append(value)
            memories.append(_first_memory(layer.mixer, hidden_1PD))
        encoded.append(EncodedPrompt(torch.stack(keys), torch.stack(values), torch.stack(memories)))
    return encoded


def fresh(model: Model, prompts: Sequence[EncodedPrompt]) -> DecoderState:
    """Rows that have written nothing yet."""
    config, rows = model.config, len(prompts)
    shape = _layers(model)[0].mixer.recurrence.state_shape
    memories_LBHEF = torch.zeros(config.num_hidden_layers, rows, *shape, device=model.device)
    for row, prompt in enumerate(prompts):
        memories_LBHEF[:, row] = prompt.memories_LHEF
    window = (config.num_hidden_layers, rows, config.conv_kernel - 1, config.hidden_size)
    return DecoderState(
        torch.zeros(window, device=model.device, dtype=model.dtype),
        memories_LBHEF,
        list(prompts),
    )


def joined(first: DecoderState, second: DecoderState) -> DecoderState:
    return DecoderState(
        torch.cat([first.windows_LBKD, second.windows_LBKD], 1),
        torch.cat([first.memories_LBHEF, second.memories_LBHEF], 1),
        first.prompts + second.prompts,
    )


def kept(state: DecoderState, rows: Sequence[int]) -> DecoderState:
    index = torch.tensor(rows, device=state.windows_LBKD.device, dtype=torch.long)
    return DecoderState(
        state.windows_LBKD[:, index], state.memories_LBHEF[:, index], [state.prompts[row] for row in rows]
    )


@torch.inference_mode()
def advance(model: Model, tokens: Sequence[int], state: DecoderState) -> Tensor:
    """Feed one token to each row; the state moves on in place. Returns the logits of the next token, [B, V]."""
    hidden_BD = model.get_input_embeddings()(torch.tensor(tokens, device=model.device))
    for index, layer in enumerate(_layers(model)):
        mixer, cross = layer.mixer, layer.cross
        normed_BD = layer.mixer_norm(hidden_BD)
        window_BKD = torch.cat([state.windows_LBKD[index], normed_BD[:, None]], 1)
        state.windows_LBKD[index] = window_BKD[:, 1:]
        read_B1D, state.memories_LBHEF[index] = mixer.recurrence(
            mixer.command_activity(window_BKD, 1), None, state.memories_LBHEF[index]
        )
        hidden_BD = hidden_BD + mixer.motor_output(read_B1D, normed_BD[:, None])[:, 0]
        query_BHE = cross.query_norm(cross.query(layer.cross_norm(hidden_BD)).unflatten(-1, (cross.heads, -1)))
        read = [
            F.scaled_dot_product_attention(query_1H1E, prompt.keys[index], prompt.values[index])
            for query_1H1E, prompt in zip(query_BHE[:, :, None].split(1), state.prompts, strict=True)
        ]
        hidden_BD = hidden_BD + cross.out(torch.cat(read).flatten(1))
        hidden_BD = hidden_BD + layer.mlp(layer.mlp_norm(hidden_BD))
    logits_BV: Tensor = model.lm_head(model.output_hidden(model.model.decoder.norm(hidden_BD)))
    return logits_BV


def _first_memory(mixer: LiquidMixer, hidden_1PD: Tensor) -> Tensor:
    if mixer.config.prime_state:
        return mixer.primed(hidden_1PD, None)[0]
    return torch.zeros(mixer.recurrence.state_shape, device=hidden_1PD.device)


def _layers(model: Model) -> list[DecoderLayer]:
    return cast(list[DecoderLayer], list(model.model.decoder.layers))
