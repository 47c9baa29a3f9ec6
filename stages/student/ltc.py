"""The liquid time-constant mixer: an LTC network wired as a Neural Circuit Policy, its neurons holding vectors.

A head's state S obeys dS/dt = -(1/tau + f) S + f k v^T, where the gate f depends on the input alone; that makes the
recurrence linear and lets a whole sequence be scanned at once. 1/tau <= 1 and f <= 4 bound the log decay of a token
by 5, which the chunked scan relies on. A token with no elapsed time (padding) changes no state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .config import MiniCodformerConfig
from .layers import RMSNorm
from .scan_chunked import scan_chunked
from .scan_naive import scan_naive
from .wiring import build_wiring, neuron_counts

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


class WiredLinear(nn.Module):
    """`copies` projections side by side that share one block of synapses.

    A weight without a synapse is 0 from the start and stays it, because its gradient is 0. So the product with the
    mask is left out where no gradient is taken.
    """

    polarity: Tensor

    def __init__(self, sources: int, destinations: int, copies: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, destinations, sources))
        self.register_buffer("polarity", torch.zeros(destinations, sources, dtype=torch.int8))

    def wire(self, polarity: Tensor) -> None:
        """Adopt the synapses, and weights of their polarity with variance 1 / fan-in."""
        init.copy_(self.polarity, polarity)
        scale = polarity / polarity.abs().sum(1, keepdim=True).clamp_min(1).sqrt()
        init.copy_(self.weight, torch.randn(self.weight.shape).abs() * scale)

    def forward(self, source: Tensor) -> Tensor:
        weight = self.weight * self.polarity.abs() if torch.is_grad_enabled() else self.weight
        return F.linear(source, weight.flatten(0, 1))


class LiquidMixer(nn.Module):
    """Sensory convolution -> inter -> command (the recurrence) -> motor."""

    def __init__(self, config: MiniCodformerConfig, layer_index: int) -> None:
        super().__init__()
        width = config.hidden_size
        _, inter = neuron_counts(width)
        self.config = config
        self.layer_index = layer_index
        self.conv_weight = nn.Parameter(torch.empty(width, config.conv_kernel))
        self.inter = WiredLinear(width, inter)
        self.command = WiredLinear(inter, width, copies=4)
        self.motor = WiredLinear(width, width)
        self.gate = nn.Linear(width, width, bias=False)
        self.head_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        self.rho = nn.Parameter(torch.empty(width))
        self.conductance_bias = nn.Parameter(torch.empty(width))

    def initialize(self) -> None:
        """Wire the circuit, and spread the time constants of each head evenly in log tau.

        1/tau = 1 / (1 + e^rho). The conductance starts at 1/tau, so that a neuron forgets as fast as it writes.
        """
        config = self.config
        wiring = build_wiring(config.hidden_size, config.ncp_sparsity, config.ncp_seed + self.layer_index)
        self.inter.wire(torch.from_numpy(wiring.sensory_to_inter))
        self.command.wire(torch.from_numpy(wiring.inter_to_command))
        self.motor.wire(torch.from_numpy(wiring.command_to_motor))
        tau = torch.logspace(math.log10(SHORTEST_TAU), math.log10(LONGEST_TAU), config.head_size)
        tau = tau.repeat(config.num_attention_heads)
        init.copy_(self.rho, (tau - 1).log())
        init.copy_(self.conductance_bias, (1 / (MAX_CONDUCTANCE * tau)).logit())
        init.normal_(self.conv_weight, std=config.conv_kernel**-0.5)

    def forward(self, hidden_BTD: Tensor, real_BT: Tensor | None, cache: Cache | None) -> Tensor:
        """`real` is true at tokens and false at padding; `cache` carries state and window from call to call."""
        # The state must be read before the window is updated, which marks the layer as having one.
        state_BHEF = self._state(cache)
        sensory_BTD = F.silu(self._convolve(hidden_BTD if real_BT is None else hidden_BTD * real_BT[..., None], cache))
        command = self.command(F.silu(self.inter(sensory_BTD)))
        query_BTHE, key_BTHE, value_BTHE, log_decay_BTHE = self._recurrence_inputs(command, real_BT)
        scan = scan_naive if hidden_BTD.shape[1] == 1 else scan_chunked
        output_BTHE, state_BHEF = scan(query_BTHE, key_BTHE, value_BTHE, log_decay_BTHE, state_BHEF)
        if cache is not None:
            cache.update_recurrent_state(state_BHEF, self.layer_index)
        read_BTD = self.head_norm(output_BTHE.to(hidden_BTD.dtype)).flatten(-2)
        motor: Tensor = self.motor(read_BTD * F.silu(self.gate(hidden_BTD)))
        return motor

    def _state(self, cache: Cache | None) -> Tensor | None:
        if cache is None or not cache.layers[self.layer_index].has_previous_state[0]:
            return None
        state_BHEF: Tensor = cache.layers[self.layer_index].recurrent_states[0]
        return state_BHEF

    def _convolve(self, hidden_BTD: Tensor, cache: Cache | None) -> Tensor:
        """Depthwise causal convolution over the last `conv_kernel` tokens."""
        steps, kernel = hidden_BTD.shape[1], self.config.conv_kernel
        if cache is not None:
            window_BDT = cache.update_conv_state(hidden_BTD.transpose(1, 2), self.layer_index, conv_kernel_size=kernel)
            hidden_BTD = window_BDT.transpose(1, 2)
        missing = steps + kernel - 1 - hidden_BTD.shape[1]
        window_BTD = F.pad(hidden_BTD, (0, 0, missing, 0))
        convolved_BTD = window_BTD[:, :steps] * self.conv_weight[:, 0]
        for tap in range(1, kernel):
            convolved_BTD = torch.addcmul(convolved_BTD, window_BTD[:, tap : tap + steps], self.conv_weight[:, tap])
        return convolved_BTD

    def _recurrence_inputs(self, command: Tensor, real_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, written key, value and log decay, each [B, T, H, E] in fp32."""
        heads = (self.config.num_attention_heads, self.config.head_size)
        query, key, value, gate = (part.unflatten(-1, heads).float() for part in command.chunk(4, -1))
        leak_HE = torch.sigmoid(-self.rho.float()).view(heads)
        conductance = MAX_CONDUCTANCE * torch.sigmoid(gate + self.conductance_bias.float().view(heads))
        elapsed = 1.0 if real_BT is None else real_BT[..., None, None].float()
        log_decay, written = liquid_step(leak_HE, conductance, elapsed, self.config.ode_unfolds)
        return F.silu(query), written * F.rms_norm(key, heads[1:]), value, log_decay
