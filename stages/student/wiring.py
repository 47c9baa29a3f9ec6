"""The synapses of a circuit, as the blocks that a layer's projections carry: a Neural Circuit Policy, or all of them.

A block holds -1 or +1 where a synapse exists (its polarity) and 0 elsewhere. It depends on nothing but its
arguments: ncps seeds its own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# transformers takes a plain import in a model's files as a requirement for loading it, and loading never wires.
try:
    from ncps.wirings import AutoNCP
except ImportError:
    AutoNCP = None

Polarity = NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Polarity blocks of one layer, each [destination neurons, source neurons]."""

    sensory_to_inter: Polarity
    inter_to_command: Polarity
    command_to_motor: Polarity


def neuron_counts(width: int) -> tuple[int, int]:
    """Total and inter neurons of the AutoNCP whose command and motor layers are both `width` wide.

    AutoNCP gives the command layer `int(0.4 n)` of its n inter and command neurons.
    """
    inner = math.ceil(width / 0.4)
    while int(0.4 * inner) < width:
        inner += 1
    return inner + width, inner - width


def build_wiring(kind: str, width: int, sparsity: float, seed: int) -> Wiring:
    """Wire `width` sensory neurons through inter and command neurons to `width` motor neurons.

    "ncp": `sparsity` is AutoNCP's: about that share of the synapses of each block is absent. Takes seconds at width
    256. "dense": none is absent, and polarities are drawn evenly.
    """
    return _ncp_wiring(width, sparsity, seed) if kind == "ncp" else _dense_wiring(width, seed)


def _dense_wiring(width: int, seed: int) -> Wiring:
    draw = np.random.default_rng(seed)
    _, inter = neuron_counts(width)
    sizes = (inter, width), (width, inter), (width, width)
    blocks = (draw.choice(np.array([-1, 1], np.int8), size) for size in sizes)
    return Wiring(**dict(zip(Wiring.__dataclass_fields__, blocks, strict=True)))


@lru_cache(maxsize=16)
def _ncp_wiring(width: int, sparsity: float, seed: int) -> Wiring:
    if AutoNCP is None:
        raise ImportError("a new student is wired by the package ncps: pip install ncps")
    units, inter_count = neuron_counts(width)
    circuit = AutoNCP(units, width, sparsity_level=sparsity, seed=seed)
    circuit.build(width)
    inter, command, motor = (circuit.get_neurons_of_layer(layer) for layer in range(3))
    assert (len(inter), len(command), len(motor)) == (inter_count, width, width)

    def block(synapses: NDArray[np.int32]) -> Polarity:
        return np.ascontiguousarray(synapses.T, dtype=np.int8)

    return Wiring(
        sensory_to_inter=block(circuit.sensory_adjacency_matrix[:, inter]),
        inter_to_command=block(circuit.adjacency_matrix[np.ix_(inter, command)]),
        command_to_motor=block(circuit.adjacency_matrix[np.ix_(command, motor)]),
    )
