"""A student's modules for decoding on a CPU, where each step is a few rows, and weights that no cache keeps.

What a product costs is how its weight is read. The library's usual form, rows times transposed weight, reads many
weights at half the memory's speed or less; two other forms of the same product come near to it, each for its number of
rows (benchmarks/student.py). What lies between the products costs by the number of its calls, so it is compiled loops.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.inference.row_loops import move_matrices, normalise
from stages.inference.stepping import advance, encode, fresh
from stages.student.config import MiniCodformerConfig
from stages.student.decoder import DecoderLayer
from stages.student.layers import RMSNorm
from stages.student.model import MiniCodformerForConditionalGeneration
from stages.student.recurrences import MAX_CONDUCTANCE, MatrixRecurrence

_STAGGER = 16
"""Numbers between two rows: rows a power of two apart would push each other out of the same lines of a cache."""

_WEIGHT_FIRST = range(2, 9)
"""Rows for which weight times transposed rows is the fastest form; for others it is rows times a weight that lies
transposed."""

_KEY_EPS = torch.finfo(torch.float32).eps
"""What `rms_norm` adds where it is told nothing."""


class FewRowsLinear(nn.Module):
    """`nn.Linear` without a bias, for inference in fp32: it keeps its weight [V, D] a second time, as [D, V]."""

    transposed_DV: Tensor

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD
        transposed_DV = F.pad(weight_VD.detach().T, (0, _STAGGER))[:, : len(weight_VD)]
        self.register_buffer("transposed_DV", transposed_DV, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rows_ND = hidden.flatten(0, -2)
        if len(rows_ND) in _WEIGHT_FIRST:
            product_NV = (self.weight @ rows_ND.T).T.contiguous()
        else:
            product_NV = rows_ND @ self.transposed_DV
        return product_NV.view(*hidden.shape[:-1], -1)


class FewRowsNorm(RMSNorm):
    """`RMSNorm` for inference in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(len(norm.weight), norm.eps)
        self.weight = norm.weight
        self._weight_D = norm.weight.detach().numpy()

    def forward(self, hidden: Tensor) -> Tensor:
        normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        rows_ND = hidden.detach().contiguous().view(-1, len(self._weight_D)).numpy()
        normalise(rows_ND, self._weight_D, self.eps, normed.view(rows_ND.shape).numpy())
        return normed


class FewRowsRecurrence(MatrixRecurrence):
    """`MatrixRecurrence` for inference in fp32: a step is one loop over the states."""

    def __init__(self, recurrence: MatrixRecurrence, config: MiniCodformerConfig) -> None:
        super().__init__(config)
        self.load_state_dict(recurrence.state_dict())
        self._leak_HE = torch.sigmoid(-self.rho.detach()).view(self.heads).numpy()
        self._bias_HE = self.conductance_bias.detach().view(self.heads).numpy()

    def step(self, command_BX: Tensor, state_BHEF: Tensor) -> Tensor:
        read_BHF = torch.empty(len(command_BX), *self.heads)
        move_matrices(
            command_BX.view(-1, self.copies, *self.heads).numpy(),
            self._leak_HE,
            self._bias_HE,
            MAX_CONDUCTANCE,
            self.unfolds,
            _KEY_EPS,
            state_BHEF.numpy(),
            read_BHF.numpy(),
        )
        return read_BHF.flatten(1)


def expect_few_rows(model: MiniCodformerForConditionalGeneration) -> None:
    """Give the output layer, all that a decoder layer does token by token, and all norms, the form for a few rows.

    The circuit's weights are 0 where there is no synapse, so their masks are left out for good. The model is for
    inference in fp32 on a CPU from then on. One token is decoded at once: loading or compiling the loops takes a second
    and more, which no answer should wait for.
    """
    model.set_output_embeddings(FewRowsLinear(model.output_weight()))
    for layer in cast(list[DecoderLayer], list(model.model.decoder.layers)):
        rooms = {
            layer.mixer: ("inter", "command", "motor", "gate"),
            layer.cross: ("query", "out"),
            layer.mlp: ("gate_up", "down"),
        }
        for room, names in rooms.items():
            for name in names:
                weight = room.get_parameter(f"{name}.weight").detach()
                room.register_module(name, FewRowsLinear(nn.Parameter(weight.flatten(0, -2))))
        if isinstance(layer.mixer.recurrence, MatrixRecurrence):
            layer.mixer.recurrence = FewRowsRecurrence(layer.mixer.recurrence, model.config)
    for room in list(model.model.modules()):
        for name, norm in room.named_children():
            if isinstance(norm, RMSNorm):
                room.register_module(name, FewRowsNorm(norm))
    any_token = [0]
    advance(model, any_token, fresh(model, encode(model, [any_token])))
