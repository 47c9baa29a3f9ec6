"""What crosses between the adapter and vLLM's workers; imports no vLLM, so that both sides may.

A request's signal comes back as a single int32 tensor, since a pooling model answers with one tensor a request; floats
travel as their bit patterns. Columns: ids K | log-probs K | log tail | entropy, then for each layer: positions M |
weights M | sink | prompt mass | entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.signals import AttentionSignal, TeacherSignal

TASK = "token_classify"
"""The pooling task whose answer is one row a token; vLLM leaves its rows to the pooler."""
PROMPT_LENGTH = "prompt_length"
"""Key of a request's P in `PoolingParams.extra_kwargs`."""
SPEC = "teacher_capture"
"""Key of the CaptureSpec's fields in vLLM's `additional_config`."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the columns of a row lie."""

    spec: CaptureSpec

    @property
    def head_width(self) -> int:
        return 2 * self.spec.k + 2

    @property
    def layer_width(self) -> int:
        return 2 * self.spec.attention_top_m + 3

    @property
    def width(self) -> int:
        return self.head_width + len(self.spec.attention_layers) * self.layer_width

    def layer(self, rows_NW: Tensor, index: int) -> Tensor:
        """The columns of the index-th summarised layer."""
        start = self.head_width + index * self.layer_width
        return rows_NW[:, start : start + self.layer_width]

    def unpack(self, rows_NW: Tensor) -> TeacherSignal:
        """The signal that a request's rows spell."""
        k = self.spec.k
        ids_NK, logprobs_NK, log_tail_N, entropy_N = _split(rows_NW[:, : self.head_width], (k, k, 1, 1))
        return TeacherSignal(
            ids_NK=ids_NK,
            logprobs_NK=as_float(logprobs_NK),
            log_tail_N=as_float(log_tail_N)[:, 0],
            entropy_N=as_float(entropy_N)[:, 0],
            attention=self._unpack_attention(rows_NW) if self.spec.attention_layers else None,
        )

    def _unpack_attention(self, rows_NW: Tensor) -> AttentionSignal:
        m, layers = self.spec.attention_top_m, len(self.spec.attention_layers)
        rows_LNW = torch.stack([self.layer(rows_NW, index) for index in range(layers)])
        positions_LNM, weights_LNM, sink, prompt, entropy = _split(rows_LNW, (m, m, 1, 1, 1))
        return AttentionSignal(
            positions_LNM=positions_LNM,
            weights_LNM=as_float(weights_LNM),
            sink_LN=as_float(sink)[..., 0],
            prompt_LN=as_float(prompt)[..., 0],
            entropy_LN=as_float(entropy)[..., 0],
        )


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
