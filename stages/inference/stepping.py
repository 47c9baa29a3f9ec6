"""The student one token at a time, many answers side by side: prompts encoded once, states of fixed size a row.

Rows join and leave between any two steps. A row is the recurrent memory and the last inputs of the convolution of
each layer, and the keys and values of its prompt, which no row copies and several may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from stages.student.decoder import CrossAttention, DecoderLayer
from stages.student.layers import split_heads
from stages.student.ltc import LiquidMixer
from stages.student.model import MiniCodformerForConditionalGeneration as Model


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What each layer needs to know of one prompt."""

    keys: tuple[Tensor, ...]
    """Cross-attention keys in the form that one query is multiplied by, [H, E, P], the scale of its scores included."""
    values: tuple[Tensor, ...]
    """[H, P, E]"""
    memories: tuple[Tensor, ...]
    """The state that the prompt primes, [H, E, F]."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *self.memories))


@dataclass(slots=True)
class DecoderState:
    """Rows that are decoded together: of each layer the last inputs, [B, K, D], and the memory, [B, H, E, F]."""

    windows: list[Tensor]
    memories: list[Tensor]
    prompts: list[EncodedPrompt]


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
            key, value = (split_heads(part, cross.heads)[0] for part in cross.key_value(hidden_1PD).chunk(2, -1))
            keys.append((cross.key_norm(key) * key.shape[-1] ** -0.5).mT.contiguous())
            values.append(value.contiguous())
            memories.append(_first_memory(layer.mixer, hidden_1PD))
        encoded.append(EncodedPrompt(tuple(keys), tuple(values), tuple(memories)))
    return encoded


@torch.inference_mode()
def fresh(model: Model, prompts: Sequence[EncodedPrompt]) -> DecoderState:
    """Rows that have written nothing yet."""
    config, rows = model.config, len(prompts)
    windows, memories = [], []
    for index, layer in enumerate(_layers(model)):
        window = (rows, config.conv_kernel, config.hidden_size)
        windows.append(torch.zeros(window, device=model.device, dtype=model.dtype))
        memory_BHEF = torch.empty(rows, *layer.mixer.recurrence.state_shape, device=model.device)
        for row, prompt in enumerate(prompts):
            memory_BHEF[row] = prompt.memories[index]
        memories.append(memory_BHEF)
    return DecoderState(windows, memories, list(prompts))


@torch.inference_mode()
def joined(first: DecoderState, second: DecoderState) -> DecoderState:
    return DecoderState(
        [torch.cat(pair) for pair in zip(first.windows, second.windows, strict=True)],
        [torch.cat(pair) for pair in zip(first.memories, second.memories, strict=True)],
        first.prompts + second.prompts,
    )


@torch.inference_mode()
def kept(state: DecoderState, rows: Sequence[int]) -> DecoderState:
    index = torch.tensor(rows, device=state.windows[0].device, dtype=torch.long)
    return DecoderState(
        [window_BKD[index] for window_BKD in state.windows],
        [memory_BHEF[index] for memory_BHEF in state.memories],
        [state.prompts[row] for row in rows],
    )


@torch.inference_mode()
def advance(model: Model, tokens: Sequence[int], state: DecoderState) -> Tensor:
    """Feed one token to each row; the state moves on in place. Returns the logits of the next token, [B, V]."""
    hidden_BD = model.get_input_embeddings()(torch.tensor(tokens, device=model.device))
    for index, layer in enumerate(_layers(model)):
        normed_BD = layer.mixer_norm(hidden_BD)
        window_BKD = torch.cat([state.windows[index][:, 1:], normed_BD[:, None]], 1)
        state.windows[index] = window_BKD
        hidden_BD = hidden_BD + layer.mixer.step(normed_BD, window_BKD, state.memories[index])
        hidden_BD += _look_up(layer.cross, layer.cross_norm(hidden_BD), state.prompts)
        hidden_BD += layer.mlp(layer.mlp_norm(hidden_BD))
    logits_BV: Tensor = model.lm_head(model.output_hidden(model.model.decoder.norm(hidden_BD)))
    return logits_BV


def _look_up(cross: CrossAttention, hidden_BD: Tensor, prompts: Sequence[EncodedPrompt]) -> Tensor:
    """Each row's attention to its own prompt."""
    query_BH1E = cross.query_norm(cross.query(hidden_BD).unflatten(-1, (cross.heads, 1, -1)))
    layer = cross.layer_index
    # Of one query two products cost little more than half of what the fused kernel does, which is made for many.
    read = [
        torch.bmm(torch.bmm(query_H1E, prompt.keys[layer]).softmax(-1), prompt.values[layer])
        for query_H1E, prompt in zip(query_BH1E.unbind(), prompts, strict=True)
    ]
    looked_up_BD: Tensor = cross.out(torch.stack(read).flatten(1))
    return looked_up_BD


def _first_memory(mixer: LiquidMixer, hidden_1PD: Tensor) -> Tensor:
    if mixer.config.prime_state:
        return mixer.primed(hidden_1PD, None)[0]
    return torch.zeros(mixer.recurrence.state_shape, device=hidden_1PD.device)


def _layers(model: Model) -> list[DecoderLayer]:
    return cast(list[DecoderLayer], list(model.model.decoder.layers))
