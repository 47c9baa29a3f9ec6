"""What a liquid neuron holds: a matrix, a number, or a matrix whose conductance lies along the key.

All solve a leaky ODE whose conductance depends on the input alone, which makes them linear in their state: a whole
sequence is scanned at once. 1/tau <= 1 and f <= 4 bound the log decay of a token by 5, which the chunked scan relies
on. A token with no elapsed time (padding) changes no state.

Shape suffixes, beside the scans': X channels of all copies of the command neurons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from . import shape
from .config import MiniCodformerConfig
from .scan_chunked import scan_chunked
from .scan_delta import scan_delta_chunked, scan_delta_naive
from .scan_fla import fla_serves, scan_fla
from .scan_naive import scan_naive

MAX_CONDUCTANCE = 4.0
SHORTEST_TAU, LONGEST_TAU = 2.0, 512.0


def liquid_step(leak: Tensor, conductance: Tensor, elapsed: Tensor | float, unfolds: int) -> tuple[Tensor, Tensor]:
    """Solve dx/dt = -(leak + conductance) x + conductance * A over `elapsed`, with the input held.

    With `unfolds` > 0 the solver is that of ncps, the fused semi-implicit Euler step repeated `unfolds` times (Hasani
    et al., Liquid Time-constant Networks, algorithm 1) in closed form; with 0 it is the exact flow.
    Returns log alpha and beta of x' = alpha x + beta A; alpha + beta <= 1.
    """
    total = leak + conductance
    exponent = elapsed * total
    log_decay = -unfolds * torch.log1p(exponent / unfolds) if unfolds else -exponent
    written = conductance / total.clamp_min(torch.finfo(total.dtype).tiny) * -torch.expm1(log_decay)
    return log_decay, written


class Recurrence(nn.Module, ABC):
    """The part of a mixer between its command and its motor neurons. `copies` command neurons feed one channel.

    `forward(command_BTX, real_BT, state_BHEF)` returns what is read at every token, [B, T, D] in fp32, and the last
    state; `real` is true at tokens and false at padding.
    """

    copies: int
    state_shape: tuple[int, int, int]
    """Heads, key channels and value channels of one row's state."""

    def __init__(self, config: MiniCodformerConfig, neurons: int) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.head_size)
        self.unfolds = config.ode_unfolds
        self.rho = nn.Parameter(torch.empty(neurons))
        self.conductance_bias = nn.Parameter(torch.empty(neurons))

    @abstractmethod
    def step(self, command_BX: Tensor, state_BHEF: Tensor) -> Tensor:
        """`forward` of one token, [B, D], with the state moved on in place. Takes no gradient."""

    def initialize(self) -> None:
        """Spread the time constants evenly in log tau.

        1/tau = 1 / (1 + e^rho). The conductance starts at 1/tau, so that a neuron forgets as fast as it writes.
        """
        tau = self._spread()
        init.copy_(self.rho, (tau - 1).log())
        init.copy_(self.conductance_bias, (1 / (MAX_CONDUCTANCE * tau)).logit())

    def _spread(self) -> Tensor:
        """Each head over the whole range."""
        heads, size = self.heads
        return torch.logspace(math.log10(SHORTEST_TAU), math.log10(LONGEST_TAU), size).repeat(heads)

    def _rates(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Leak and conductance in fp32; the last dimensions of `gate` are the neurons."""
        bias = self.conductance_bias.float().view(gate.shape[2:])
        return torch.sigmoid(-self.rho.float()).view(gate.shape[2:]), MAX_CONDUCTANCE * torch.sigmoid(gate + bias)


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class DiagonalRecurrence(Recurrence):
    """One whose state decays along its keys alone: a subclass says what of the command neurons enters the scan."""

    scan: Scan = staticmethod(scan_chunked)
    """What computes `scan_naive` over more than one step where fla's kernels do not serve."""

    def forward(self, command_BTX: Tensor, real_BT: Tensor | None, state_BHEF: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = self._inputs(command_BTX, 1.0 if real_BT is None else real_BT[..., None, None].float())
        scan = scan_naive if command_BTX.shape[1] == 1 else scan_fla if fla_serves(inputs[0]) else self.scan
        output_BTHF, state_BHEF = scan(*inputs, state_BHEF)
        return output_BTHF.flatten(-2), state_BHEF

    def step(self, command_BX: Tensor, state_BHEF: Tensor) -> Tensor:
        query_BHE, key_BHE, value_BHF, log_decay_BHE = (part[:, 0] for part in self._inputs(command_BX[:, None], 1.0))
        state_BHEF.mul_(log_decay_BHE.exp().unsqueeze(-1)).addcmul_(key_BHE.unsqueeze(-1), value_BHF.unsqueeze(-2))
        return (query_BHE.unsqueeze(-2) @ state_BHEF).flatten(1)

    @abstractmethod
    def _inputs(self, command_BTX: Tensor, elapsed: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and log decay of the scan, in fp32; `elapsed` is 0 at padding."""


class MatrixRecurrence(DiagonalRecurrence):
    """dS/dt = -(1/tau + f) S + f k v^T: an LTC neuron that holds a vector, one matrix a head."""

    copies = 4

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.state_shape = (*self.heads, config.head_size)

    def _inputs(self, command_BTX: Tensor, elapsed: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, gate = command_BTX.float().unflatten(-1, (4, *self.heads)).unbind(2)
        log_decay, written = liquid_step(*self._rates(gate), elapsed, self.unfolds)
        return F.silu(query), written * F.rms_norm(key, self.heads[1:]), value, log_decay


class VectorRecurrence(DiagonalRecurrence):
    """dx/dt = -(1/tau + f) x + f A: the LTC neuron of ncps as it stands, one number a channel."""

    copies = 2

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.state_shape = (config.hidden_size, 1, 1)

    def _inputs(self, command_BTX: Tensor, elapsed: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        target, gate = (part[..., None].float() for part in command_BTX.chunk(2, -1))
        log_decay, written = liquid_step(*self._rates(gate), elapsed, self.unfolds)
        return torch.ones_like(written), written, target, log_decay


class DeltaRecurrence(Recurrence):
    """dS/dt = -(1/tau + f k k^T) S + f k v^T with |k| = 1: only what lies along the key is replaced.

    Its one fused Euler step is Gated DeltaNet (Yang et al., Gated Delta Networks): S' = a (I - b k k^T) S + b k v^T. A
    head has one leak and one conductance.
    """

    copies = 4

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__(config, config.num_attention_heads)
        self.state_shape = (*self.heads, config.head_size)

    def _spread(self) -> Tensor:
        return torch.logspace(math.log10(SHORTEST_TAU), math.log10(LONGEST_TAU), self.heads[0])

    def forward(self, command_BTX: Tensor, real_BT: Tensor | None, state_BHEF: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value, gate = (part.unflatten(-1, self.heads).float() for part in command_BTX.chunk(4, -1))
        leak_H, conductance_BTH = self._rates(gate.sum(-1) * self.heads[1] ** -0.5)
        elapsed = 1.0 if real_BT is None else real_BT[..., None].float()
        log_decay_BTH, _ = liquid_step(leak_H, torch.zeros_like(conductance_BTH), elapsed, self.unfolds)
        log_along_BTH, written_BTH = liquid_step(leak_H, conductance_BTH, elapsed, self.unfolds)
        erased_BTH = -torch.expm1(log_along_BTH - log_decay_BTH)
        scan = scan_delta_naive if command_BTX.shape[1] == 1 else scan_delta_chunked
        inputs = F.silu(query), F.normalize(key, dim=-1), value, log_decay_BTH, erased_BTH, written_BTH
        output_BTHF, state_BHEF = scan(*inputs, state_BHEF)
        return output_BTHF.flatten(-2), state_BHEF

    def step(self, command_BX: Tensor, state_BHEF: Tensor) -> Tensor:
        read_B1D, moved_BHEF = self.forward(command_BX[:, None], None, state_BHEF)
        state_BHEF.copy_(moved_BHEF)
        return read_B1D[:, 0]


RECURRENCES: dict[str, Callable[[MiniCodformerConfig], Recurrence]] = {
    "matrix": MatrixRecurrence,
    "vector": VectorRecurrence,
    "delta": DeltaRecurrence,
}
assert tuple(RECURRENCES) == shape.RECURRENCES
