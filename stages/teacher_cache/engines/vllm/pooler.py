"""The pooler of a capturing model: which rows of a step are wanted, and what is remembered between steps.

vLLM flattens the tokens of all requests of a step into one batch, and may cut a long request into several steps
(chunked prefill). Prompt rows never reach the head. Between the steps of one request its finished rows and the keys
of the chosen layers wait here, bound to the life of vLLM's own state of that request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from stages.teacher_cache.draws import position_keys
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.attention import chosen_layers
from stages.teacher_cache.engines.vllm.head import ResponseHead
from stages.teacher_cache.engines.vllm.wire import DRAW_KEY, FULL, PROMPT_LENGTH, SPEC, TASK, RowLayout, pack


@dataclass(slots=True)
class _Kept:
    """What a request leaves behind for its next step; by layer where there are several."""

    head: list[Tensor] = field(default_factory=list)
    full: list[Tensor] = field(default_factory=list)
    attention: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Span:
    """One request's tokens in this step: batch rows start..stop hold its positions first..first+stop-start."""

    start: int
    stop: int
    first: int
    prompt_length: int
    draw_key: int
    full: bool
    finished: bool
    state: PoolingStates

    def rows_from(self, position: int) -> slice:
        """Batch rows of this request's positions from `position` on."""
        return slice(self.start + min(max(position - self.first, 0), self.stop - self.start), self.stop)

    def position_of(self, row: int) -> int:
        """The position that stands in a batch row."""
        return self.first + row - self.start

    @property
    def response(self) -> slice:
        """Batch rows that predict response tokens: from position P-1 on."""
        return self.rows_from(self.prompt_length - 1)

    def draw_keys(self, device: torch.device) -> Tensor:
        """[N] for the response rows."""
        rows = self.response
        first = self.position_of(rows.start) - (self.prompt_length - 1)
        return position_keys(self.draw_key, torch.arange(first, first + rows.stop - rows.start, device=device))


class CapturePooler(Pooler):
    """Turns a step's hidden states into the answers that `wire` describes."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        super().__init__()
        self._spec = CaptureSpec.from_json(vllm_config.additional_config[SPEC])
        layout = RowLayout(self._spec)
        self._head_width, self._attention_width = sum(layout.head_widths), sum(layout.attention_widths)
        self._head = ResponseHead(model.lm_head, model.logits_processor, self._spec)
        attention = self._spec.attention
        self._layers = [] if attention is None else chosen_layers(model, attention.layers, attention.top_m)
        self._kept: WeakKeyDictionary[PoolingStates, _Kept] = WeakKeyDictionary()

    def get_supported_tasks(self) -> Set[str]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """The answer to each request that ends in this step, None for the others."""
        spans = list(_spans(pooling_metadata))
        for span in spans:
            if span.first == 0:
                self._kept[span.state] = _Kept()
        self._summarise_head(hidden_states, spans)
        for index in range(len(self._layers)):
            self._summarise_layer(index, spans)
        return [self._answer(span) if span.finished else None for span in spans]

    def _summarise_head(self, hidden_BD: Tensor, spans: list[_Span]) -> None:
        hidden_ND = torch.cat([hidden_BD[span.response] for span in spans])
        keys_N = torch.cat([span.draw_keys(hidden_BD.device) for span in spans])
        rows_NW = hidden_ND.new_empty((hidden_ND.shape[0], self._head_width), dtype=torch.int32)
        self._head.summarise(hidden_ND, keys_N, rows_NW)
        parts = rows_NW.split([span.stop - span.response.start for span in spans])
        for span, part_NW in zip(spans, parts, strict=True):
            kept = self._kept[span.state]
            kept.head.append(part_NW)
            if span.full:
                kept.full.append(self._head.logprobs(hidden_BD[span.response]))

    def _summarise_layer(self, index: int, spans: list[_Span]) -> None:
        layer = self._layers[index]
        queries_BHd, keys_BHd = layer.take()
        for span in spans:
            kept, keys_SHd = self._kept[span.state], keys_BHd[span.start : span.stop]
            if span.first > 0:
                keys_SHd = torch.cat([kept.keys[index], keys_SHd])
            if not span.finished:
                kept.keys[index] = keys_SHd.clone()
            rows = span.rows_from(self._spec.first_attention_row(span.prompt_length))
            rows_AW = queries_BHd.new_empty((rows.stop - rows.start, self._attention_width), dtype=torch.int32)
            layer.summarise(
                queries_BHd[rows],
                keys_SHd,
                first_row=span.position_of(rows.start),
                prompt_length=span.prompt_length,
                rows_NW=rows_AW,
            )
            kept.attention[index].append(rows_AW)

    def _answer(self, span: _Span) -> Tensor:
        kept = self._kept.pop(span.state)
        layers = [torch.cat(kept.attention[index]) for index in range(len(self._layers))]
        return pack(torch.cat(kept.head), layers, kept.full)


def _spans(metadata: PoolingMetadata) -> Iterator[_Span]:
    cursor = metadata.get_pooling_cursor()
    start = 0
    for count, length, finished, params, state in zip(
        cursor.num_scheduled_tokens_cpu.tolist(),
        cursor.seq_lens_cpu.tolist(),
        cursor.get_finished_mask(),
        metadata.pooling_params,
        metadata.pooling_states,
        strict=True,
    ):
        # vLLM sizes its memory with requests of its own, which say nothing: all their rows count as a response's.
        said = params.extra_kwargs or {}
        first = length - count
        prompt_length, draw_key, full = said.get(PROMPT_LENGTH, 1), said.get(DRAW_KEY, 0), said.get(FULL, False)
        yield _Span(start, start + count, first, prompt_length, draw_key, full, finished, state)
        start += count
