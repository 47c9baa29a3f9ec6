"""An output layer for decoding on a CPU, where each step multiplies a few rows by a weight far larger than any cache.

What such a product costs is how its weight is read. The library's usual form, rows times transposed weight, reads it
at a third of the memory's speed or less; two other forms of the same product come near to it, each for its number of
rows (benchmarks/student.py).
"""

from __future__ import annotations

from torch import Tensor, nn

_WEIGHT_FIRST = range(2, 9)
"""Rows for which weight times transposed rows is the fastest form."""


class FewRowsLinear(nn.Module):
    """`nn.Linear` without a bias, for inference in fp32: it keeps its weight a second time, transposed in memory."""

    transposed_DV: Tensor

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD
        self.register_buffer("transposed_DV", weight_VD.detach().T.contiguous(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows_ND = hidden.flatten(0, -2)
        if len(rows_ND) in _WEIGHT_FIRST:
            logits_NV = (self.weight @ rows_ND.T).T.contiguous()
        else:
            logits_NV = rows_ND @ self.transposed_DV
        logits: Tensor = logits_NV.unflatten(0, hidden.shape[:-1])
        return logits
