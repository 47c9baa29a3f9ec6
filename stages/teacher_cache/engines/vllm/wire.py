"""What crosses between the adapter and vLLM's workers; imports no vLLM, so that both sides may.

A pooling model answers with one tensor a request: here a flat int32 one, floats as their bit patterns. First the head's
rows [N, W]: ids K | log-probs K | draws K, where there are draws | log tail | entropy | curve 2J. Then, for each
summarised layer, its rows [A, W']: positions M | weights M | sink | prompt mass | entropy. A = N, or all the sample's
rows but the first. Last, where they were asked for, all log-probabilities [N, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.contract import DRAWN
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal

TASK = "token_classify"
"""The pooling task whose answer is one row a token; vLLM leaves its rows to the pooler."""
PROMPT_LENGTH = "prompt_length"
"""Key of a request's P in `PoolingParams.extra_kwargs`."""
DRAW_KEY = "draw_key"
"""Key of a request's `draws.draw_key` there."""
FULL = "full"
"""Key there: true where all log-probabilities [N, V] are asked for too."""
SPEC = "teacher_capture"
"""Key of the CaptureSpec, as JSON, in vLLM's `additional_config`."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the columns of a row lie."""

    spec: CaptureSpec

    @property
    def head_widths(self) -> tuple[int, ...]:
        kept = self.spec.selection.most_kept
        drawn = kept if self.spec.selection.kind in DRAWN else 0
        return kept, kept, drawn, 1, 1, 2 * len(self.spec.curve)

    @property
    def attention_widths(self) -> tuple[int, ...]:
        kept = 0 if self.spec.attention is None else self.spec.attention.top_m
        return kept, kept, 1, 1, 1

    def unpack(self, answer: Tensor, positions: int) -> TeacherSignal:
        """The signal of a sample with N = `positions` that a request's answer spells."""
        head_width = sum(self.head_widths)
        head, attention = answer[: positions * head_width], answer[positions * head_width :]
        ids_NK, logprobs_NK, draws_NK, log_tail_N, entropy_N, curve_NJ = _split(
            head.view(positions, head_width), self.head_widths
        )
        return TeacherSignal(
            ids_NK=ids_NK,
            logprobs_NK=as_float(logprobs_NK) if self.spec.selection.logprobs else None,
            draws_NK=draws_NK if self.spec.selection.kind in DRAWN else None,
            log_tail_N=as_float(log_tail_N)[:, 0],
            entropy_N=as_float(entropy_N)[:, 0],
            curve_NJ=as_float(curve_NJ) if self.spec.curve else None,
            attention=self._unpack_attention(attention) if self.spec.layers else None,
        )

    def _unpack_attention(self, answer: Tensor) -> AttentionSignal:
        rows_LNW = answer.view(len(self.spec.layers), -1, sum(self.attention_widths))
        positions_LNM, weights_LNM, sink, prompt, entropy = _split(rows_LNW, self.attention_widths)
        return AttentionSignal(
            positions_LNM=positions_LNM,
            weights_LNM=as_float(weights_LNM),
            sink_LN=as_float(sink)[..., 0],
            prompt_LN=as_float(prompt)[..., 0],
            entropy_LN=as_float(entropy)[..., 0],
        )


def pack(head_NW: Tensor, layers_AW: Sequence[Tensor], full_NV: Sequence[Tensor] = ()) -> Tensor:
    """A request's answer from its head's rows, those of each layer, and the parts of all log-probabilities."""
    parts = [head_NW, *layers_AW, *(part_NV.view(torch.int32) for part_NV in full_NV)]
    return torch.cat([part.flatten() for part in parts])


def _split(columns: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in columns.split(widths, dim=-1))


def write_columns(rows_NW: Tensor, *columns: Tensor) -> None:
    """Fill a row's columns from left to right; one-dimensional tensors take one column."""
    start = 0
    for column in columns:
        column_NC = column[:, None] if column.dim() == 1 else column
        stop = start + column_NC.shape[1]
        bits = column_NC.contiguous().view(torch.int32) if column_NC.is_floating_point() else column_NC
        rows_NW[:, start:stop] = bits
        start = stop
    assert start == rows_NW.shape[1], "a row has as many columns as were written"


def as_float(bits: Tensor) -> Tensor:
    """The floats whose bit patterns these are."""
    return bits.view(torch.float32)
