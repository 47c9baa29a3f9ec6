"""The liquid time-constant mixer: an LTC network wired as a Neural Circuit Policy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .config import MiniCodformerConfig
from .layers import RMSNorm
from .recurrences import RECURRENCES
from .wiring import build_wiring, neuron_counts


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
        self.recurrence = RECURRENCES[config.recurrence](config)
        self.inter = WiredLinear(width, inter)
        self.command = WiredLinear(inter, width, copies=self.recurrence.copies)
        self.motor = WiredLinear(width, width)
        self.gate = nn.Linear(width, width, bias=False)
        self.head_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def initialize(self) -> None:
        """Wire the circuit, and set the time constants."""
        config = self.config
        wiring = build_wiring(
            config.wiring, config.hidden_size, config.ncp_sparsity, config.ncp_seed + self.layer_index
        )
        self.inter.wire(torch.from_numpy(wiring.sensory_to_inter))
        self.command.wire(torch.from_numpy(wiring.inter_to_command))
        self.motor.wire(torch.from_numpy(wiring.command_to_motor))
        self.recurrence.initialize()
        init.normal_(self.conv_weight, std=config.conv_kernel**-0.5)

    def forward(
        self,
        hidden_BTD: Tensor,
        real_BT: Tensor | None,
        cache: Cache | None,
        encoder_BPD: Tensor,
        encoder_real_BP: Tensor | None,
    ) -> Tensor:
        """`real` is true at tokens and false at padding; `cache` carries state and window from call to call."""
        # The state must be read before the window is updated, which marks the layer as having one.
        state_BHEF = self._state(cache)
        if state_BHEF is None and self.config.prime_state:
            state_BHEF = self.primed(encoder_BPD, encoder_real_BP)
        command_BTX = self.command_activity(
            self._window(_without_padding(hidden_BTD, real_BT), cache), hidden_BTD.shape[1]
        )
        read_BTD, state_BHEF = self.recurrence(command_BTX, real_BT, state_BHEF)
        if cache is not None:
            cache.update_recurrent_state(state_BHEF, self.layer_index)
        return self.motor_output(read_BTD, hidden_BTD)

    def step(self, hidden_BD: Tensor, window_BKD: Tensor, state_BHEF: Tensor) -> Tensor:
        """`forward` of one token behind others: the window ends with it, and the state moves on in place."""
        convolved_BD = (window_BKD * self.conv_weight.T).sum(1)
        command_BX: Tensor = self.command(F.silu(self.inter(F.silu(convolved_BD))))
        return self.motor_output(self.recurrence.step(command_BX, state_BHEF), hidden_BD)

    def primed(self, encoder_BPD: Tensor, real_BP: Tensor | None) -> Tensor:
        """The state that this mixer would have after reading the prompt's encoding, [B, H, E, F]."""
        command_BPX = self.command_activity(_without_padding(encoder_BPD, real_BP), encoder_BPD.shape[1])
        state_BHEF: Tensor = self.recurrence(command_BPX, real_BP, None)[1]
        return state_BHEF

    def command_activity(self, window_BTD: Tensor, steps: int) -> Tensor:
        """The command neurons at the last `steps` tokens, after the depthwise causal convolution."""
        kernel = self.config.conv_kernel
        window_BTD = F.pad(window_BTD, (0, 0, steps + kernel - 1 - window_BTD.shape[1], 0))
        convolved_BTD = window_BTD[:, :steps] * self.conv_weight[:, 0]
        for tap in range(1, kernel):
            convolved_BTD = torch.addcmul(convolved_BTD, window_BTD[:, tap : tap + steps], self.conv_weight[:, tap])
        command_BTX: Tensor = self.command(F.silu(self.inter(F.silu(convolved_BTD))))
        return command_BTX

    def motor_output(self, read_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """From what the recurrence reads to the mixer's output, gated by its input."""
        read = read_BTD.to(hidden_BTD.dtype).unflatten(-1, (self.config.num_attention_heads, -1))
        motor: Tensor = self.motor(self.head_norm(read).flatten(-2) * F.silu(self.gate(hidden_BTD)))
        return motor

    def _state(self, cache: Cache | None) -> Tensor | None:
        if cache is None or not cache.layers[self.layer_index].has_previous_state[0]:
            return None
        state_BHEF: Tensor = cache.layers[self.layer_index].recurrent_states[0]
        return state_BHEF

    def _window(self, hidden_BTD: Tensor, cache: Cache | None) -> Tensor:
        """The tokens, behind those of earlier calls that the convolution still reaches."""
        if cache is None:
            return hidden_BTD
        kernel = self.config.conv_kernel
        window_BDT = cache.update_conv_state(hidden_BTD.transpose(1, 2), self.layer_index, conv_kernel_size=kernel)
        window_BTD: Tensor = window_BDT.transpose(1, 2)
        return window_BTD


def _without_padding(hidden_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Zeros at padding, so that no convolution sees it."""
    return hidden_BTD if real_BT is None else hidden_BTD * real_BT[..., None]
