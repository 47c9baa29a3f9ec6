"""The pooler of a capturing model: which rows of a step belong to a response, and what is remembered between steps.

vLLM flattens the tokens of all requests of a step into one batch, and may cut a long request into several steps
(chunked prefill). Prompt rows never reach the head. Between the steps of one request its finished rows and the keys
of the chosen layers wait here, bound to the life of vLLM's own state of that request.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.attention import chosen_layers
from stages.teacher_cache.engines.vllm.head import ResponseHead
from stages.teacher_cache.engines.vllm.wire import PROMPT_LENGTH, SPEC, TASK, RowLayout


@dataclass(slots=True)
class _Kept:
    """What a request leaves behind for its next step."""

    rows: list[Tensor] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Span:
    """One request's tokens in this step: batch rows start..stop hold its positions first..first+stop-start."""

    start: int
    stop: int
    first: int
    prompt_length: int
    finished: bool
    state: PoolingStates

    @property
    def skipped(self) -> int:
        """Leading tokens whose rows predict prompt tokens; row P-1 is the first that predicts a response token."""
        return min(max(self.prompt_length - 1 - self.first, 0), self.stop - self.start)

    @property
    def response(self) -> slice:
        """Batch rows that predict response tokens."""
        return slice(self.start + self.skipped, self.stop)


class CapturePooler(Pooler):
    """Turns a step's hidden states into the packed rows of `RowLayout`."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        super().__init__()
        raw = vllm_config.additional_config[SPEC]
        spec = CaptureSpec(**{**raw, "attention_layers": tuple(raw["attention_layers"])})
        self._layout = RowLayout(spec)
        self._head = ResponseHead(model.lm_head, model.logits_processor, spec.k)
        self._layers = chosen_layers(model, spec.attention_layers, spec.attention_top_m)
        self._kept: WeakKeyDictionary[PoolingStates, _Kept] = WeakKeyDictionary()

    def get_supported_tasks(self) -> Set[str]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """Packed rows [N, W] of each request that ends in this step, None for the others."""
        spans = list(_spans(pooling_metadata))
        hidden_ND = torch.cat([hidden_states[span.response] for span in spans])
        rows_NW = hidden_ND.new_empty((hidden_ND.shape[0], self._layout.width), dtype=torch.int32)
        self._head.summarise(hidden_ND, rows_NW[:, : self._layout.head_width])
        parts = rows_NW.split([span.stop - span.response.start for span in spans])
        for span in spans:
            if span.first == 0:
                self._kept[span.state] = _Kept()
        for index in range(len(self._layers)):
            self._summarise_layer(index, spans, parts)
        return [self._answer(span, rows) for span, rows in zip(spans, parts, strict=True)]

    def _summarise_layer(self, index: int, spans: list[_Span], parts: tuple[Tensor, ...]) -> None:
        layer = self._layers[index]
        queries_BHd, keys_BHd = layer.take()
        for span, rows_NW in zip(spans, parts, strict=True):
            kept, keys_SHd = self._kept[span.state].keys, keys_BHd[span.start : span.stop]
            if span.first > 0:
                keys_SHd = torch.cat([kept[index], keys_SHd])
            if not span.finished:
                kept[index] = keys_SHd.clone()
            layer.summarise(
                queries_BHd[span.response],
                keys_SHd,
                first_row=span.first + span.skipped,
                prompt_length=span.prompt_length,
                rows_NW=self._layout.layer(rows_NW, index),
            )

    def _answer(self, span: _Span, rows_NW: Tensor) -> Tensor | None:
        kept = self._kept[span.state]
        if not span.finished:
            kept.rows.append(rows_NW.clone())
            return None
        del self._kept[span.state]
        return torch.cat([*kept.rows, rows_NW])


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
        prompt_length = (params.extra_kwargs or {}).get(PROMPT_LENGTH, 1)
        yield _Span(start, start + count, length - count, prompt_length, finished, state)
        start += count
