"""O1: a cascade of our liquid steps and scans is the LTC of ncps, neuron for neuron.

NCP wiring is acyclic but for command-to-command synapses. Without those, each layer of neurons is a linear recurrence
whose gates come from the layer before, read before each fused Euler step, as ncps does.
"""

from __future__ import annotations

import pytest
import torch
from ncps.torch import LTC
from ncps.wirings import NCP
from torch import Tensor

from stages.student.recurrences import liquid_step
from stages.student.scan_chunked import scan_chunked

TOKENS = 40


class Cascade:
    """The parameters of an ncps cell, run layer by layer over whole sequences."""

    def __init__(self, network: LTC, wiring: NCP) -> None:
        self.cell = network.rnn_cell
        self.wiring = wiring
        positive = ("w", "sensory_w", "cm", "gleak")
        self.params = {
            name: self.cell.make_positive_fn(value) if name in positive else value
            for name, value in self.cell._params.items()
        }

    def run(self, inputs_BTD: Tensor) -> Tensor:
        """Potentials [B, T, neurons] after the last Euler step of each token."""
        unfolds = self.cell._ode_unfolds
        inputs_BTD = self.cell._map_inputs(inputs_BTD)
        sensory = [current.repeat_interleave(unfolds, 1) for current in self._currents(inputs_BTD, "sensory_", ...)]
        batch, tokens, _ = inputs_BTD.shape
        potentials = torch.zeros(batch, tokens * unfolds, self.cell.state_size, dtype=inputs_BTD.dtype)
        for layer in range(3):
            neurons = self.wiring.get_neurons_of_layer(layer)
            before = torch.nn.functional.pad(potentials, (0, 0, 1, 0))[:, :-1]
            conductance, current = self._currents(before, "", neurons)
            conductance, current = conductance + sensory[0][..., neurons], current + sensory[1][..., neurons]
            potentials = potentials.clone()
            potentials[..., neurons] = self.integrate(neurons, conductance, current, 1 / unfolds, 1)
        return potentials[:, unfolds - 1 :: unfolds]

    def integrate(self, neurons, conductance: Tensor, current: Tensor, elapsed: float, unfolds: int) -> Tensor:
        """Potentials of `neurons` after every step, from the synapses' summed conductances and currents."""
        capacity, leak = self.params["cm"][neurons], self.params["gleak"][neurons]
        log_decay, written = liquid_step(
            (leak + self.cell._epsilon) / capacity, conductance / capacity, elapsed, unfolds
        )
        target = (leak * self.params["vleak"][neurons] + current) / conductance
        one_neuron_a_head = [tensor.unsqueeze(-1) for tensor in (torch.ones_like(target), written, target, log_decay)]
        output, _ = scan_chunked(*one_neuron_a_head)
        return output.squeeze(-1)

    def _currents(self, source: Tensor, prefix: str, destinations) -> tuple[Tensor, Tensor]:
        weight, mu, sigma, mask, reversal = (
            self.params[prefix + name][:, destinations] for name in ("w", "mu", "sigma", "sparsity_mask", "erev")
        )
        activity = weight * mask * torch.sigmoid(sigma * (source.unsqueeze(-1) - mu))
        return activity.sum(-2), (activity * reversal).sum(-2)


@pytest.fixture(params=[1, 6])
def pair(request) -> tuple[LTC, Cascade]:
    torch.manual_seed(0)
    wiring = NCP(
        inter_neurons=12,
        command_neurons=8,
        motor_neurons=4,
        sensory_fanout=12,
        inter_fanout=4,
        recurrent_command_synapses=0,
        motor_fanin=4,
        seed=1,
    )
    network = LTC(7, wiring, ode_unfolds=request.param).double()
    return network, Cascade(network, wiring)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(3, TOKENS, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_O1_outputs_and_gradients_equal_ncps(pair, inputs):
    network, cascade = pair
    expected, state = network(inputs)
    potentials = cascade.run(inputs)
    params = network.rnn_cell._params
    outputs = potentials[..., :4] * params["output_w"] + params["output_b"]
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(potentials[:, -1], state, rtol=1e-12, atol=1e-13)

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(outputs.square().sum(), trained)
    theirs = torch.autograd.grad(expected.square().sum(), trained)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-9, atol=1e-11)


def test_O1_closed_form_of_all_unfolds_equals_ncps_where_inputs_are_held(pair, inputs):
    """Inter neurons see only the token itself, so one closed-form step a token replaces all Euler steps."""
    network, cascade = pair
    inter = cascade.wiring.get_neurons_of_layer(0)
    conductance, current = cascade._currents(network.rnn_cell._map_inputs(inputs), "sensory_", inter)
    potentials = cascade.integrate(inter, conductance, current, 1.0, network.rnn_cell._ode_unfolds)
    torch.testing.assert_close(potentials, cascade.run(inputs)[..., inter], rtol=1e-12, atol=1e-13)
    _, state = network(inputs)
    torch.testing.assert_close(potentials[:, -1], state[:, inter], rtol=1e-12, atol=1e-13)
