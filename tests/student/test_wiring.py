"""The NCP circuit: its shape, its determinism, and that a weight without a synapse does nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ncps.wirings import AutoNCP

from stages.student import wiring as wiring_module
from stages.student.ltc import LiquidMixer, WiredLinear
from stages.student.wiring import build_wiring, neuron_counts


@given(st.integers(3, 2048))
def test_command_and_motor_layers_are_as_wide_as_the_model(width):
    units, inter = neuron_counts(width)
    assert units - width - inter == width
    assert int(0.4 * (units - width)) == width


def test_blocks_are_the_synapses_of_autoncp():
    width, seed = 32, 22_222
    units, inter = neuron_counts(width)
    wiring = build_wiring("ncp", width, 0.5, seed)
    circuit = AutoNCP(units, width, sparsity_level=0.5, seed=seed)
    circuit.build(width)
    motor_ids, command_ids, inter_ids = np.split(np.arange(units), [width, 2 * width])
    assert len(inter_ids) == inter
    np.testing.assert_array_equal(wiring.sensory_to_inter, circuit.sensory_adjacency_matrix[:, inter_ids].T)
    np.testing.assert_array_equal(wiring.inter_to_command, circuit.adjacency_matrix[inter_ids][:, command_ids].T)
    np.testing.assert_array_equal(wiring.command_to_motor, circuit.adjacency_matrix[command_ids][:, motor_ids].T)
    for block in (wiring.sensory_to_inter, wiring.inter_to_command, wiring.command_to_motor):
        assert set(np.unique(block)) == {-1, 0, 1}
        assert 0.4 < np.abs(block).mean() < 0.6


def test_layers_are_wired_differently_and_a_seed_always_alike(make_student):
    first, again = make_student(), make_student()
    one, two = (layer.mixer.command.polarity for layer in first.model.decoder.layers)
    assert not torch.equal(one, two)
    assert torch.equal(one, again.model.decoder.layers[0].mixer.command.polarity)


def test_weights_start_with_the_polarity_of_their_synapse(make_student):
    mixers = [module for module in make_student().modules() if isinstance(module, WiredLinear)]
    assert len(mixers) == 6
    for wired in mixers:
        assert torch.equal(wired.weight.sign(), wired.polarity.expand_as(wired.weight).float())


def test_a_weight_without_a_synapse_is_zero_and_stays_it(make_student, tokens):
    student = make_student().train()
    wired = [module for module in student.modules() if isinstance(module, WiredLinear)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1)
    before = [module.weight.detach().clone() for module in wired]
    for step in range(3):
        optimizer.zero_grad()
        student(tokens(2, 9, seed=step), labels=tokens(2, 20, seed=step + 10)).loss.backward()
        optimizer.step()
    for module, start in zip(wired, before, strict=True):
        absent = module.polarity.eq(0).expand_as(module.weight)
        assert module.weight[absent].eq(0).all()
        assert module.weight[~absent].ne(start[~absent]).all()


def test_a_weight_without_a_synapse_does_not_act_in_training(make_student):
    wired = make_student().model.decoder.layers[0].mixer.command
    source = torch.randn(3, wired.weight.shape[-1])
    expected = wired(source)
    with torch.no_grad():
        torch.testing.assert_close(wired(source), expected)
        wired.weight[wired.polarity.eq(0).expand_as(wired.weight)] = 7.0
    torch.testing.assert_close(wired(source), expected)


def test_time_constants_are_spread_evenly_in_log_from_2_to_512(make_student):
    mixer: LiquidMixer = make_student().model.decoder.layers[0].mixer
    tau = (1 + mixer.recurrence.rho.exp()).view(2, 16)
    torch.testing.assert_close(tau[:, 0], torch.full((2,), 2.0))
    torch.testing.assert_close(tau[:, -1], torch.full((2,), 512.0))
    torch.testing.assert_close(tau.log().diff(), torch.full((2, 15), float(np.log(256) / 15)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(4 * mixer.recurrence.conductance_bias.sigmoid(), 1 / tau.flatten())


def test_a_dense_circuit_has_every_synapse_with_either_polarity_and_a_seed_of_its_own():
    first, again, other = (build_wiring("dense", 32, 0.5, seed) for seed in (1, 1, 2))
    ncp = build_wiring("ncp", 32, 0.5, 1)
    for name in ("sensory_to_inter", "inter_to_command", "command_to_motor"):
        block = getattr(first, name)
        assert block.shape == getattr(ncp, name).shape
        assert set(np.unique(block)) == {-1, 1}
        np.testing.assert_array_equal(block, getattr(again, name))
        assert (block != getattr(other, name)).any()


def test_wiring_without_ncps_says_what_to_install(monkeypatch):
    monkeypatch.setattr(wiring_module, "AutoNCP", None)
    with pytest.raises(ImportError, match="pip install ncps"):
        build_wiring("ncp", 16, 0.5, 1)
