"""Linear layers for decoding on a CPU, where each step multiplies a few rows by weights that no cache keeps.

What such a product costs is how its weight is read. The library's usual form, rows times transposed weight, reads one
that is higher than wide at half the memory's speed or less; two other forms of the same product come near to it, each
for its number of rows (benchmarks/student.py).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from stages.student.decoder import DecoderLayer
from stages.student.model import MiniCodformerForConditionalGeneration

_WEIGHT_FIRST = range(2, 9)
"""Rows for which weight times transposed rows is the fastest form."""


class FewRowsLinear(nn.Module):
    """`nn.Linear` without a bias, for inference in fp32: it keeps its weight [V, D] a second time, as [D, V]."""

    transposed_DV: Tensor

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD
        self.register_buffer("transposed_DV", weight_VD.detach().T.contiguous(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows_ND = hidden.flatten(0, -2)
        if len(rows_ND) in _WEIGHT_FIRST:
            product_NV = (self.weight @ rows_ND.T).T.contiguous()
        else:
            product_NV = rows_ND @ self.transposed_DV
        product: Tensor = product_NV.unflatten(0, hidden.shape[:-1])
        return product


def expect_few_rows(model: MiniCodformerForConditionalGeneration) -> None:
    """Give the output layer, and what widens in each decoder layer, the form for a few rows.

    The circuit's weights are 0 where there is no synapse, so their masks are left out for good. The model is for
    inference in fp32 on a CPU from then on.
    """
    model.set_output_embeddings(FewRowsLinear(model.output_weight()))
    for layer in cast(list[DecoderLayer], list(model.model.decoder.layers)):
        for room, name in ((layer.mlp, "gate_up"), (layer.mixer, "inter"), (layer.mixer, "command")):
            weight = room.get_parameter(f"{name}.weight").detach()
            room.register_module(name, FewRowsLinear(nn.Parameter(weight.flatten(0, -2))))
