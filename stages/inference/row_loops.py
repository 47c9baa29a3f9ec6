"""What decoding does to each row besides products, as compiled loops over numpy arrays.

As tensor operations these are many, each over a few hundred numbers, and calling them takes longer than computing
them. Here each is one call, and a state is read and written once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled

Floats = NDArray[np.floating[Any]]


@compiled
def normalise(rows_ND: Floats, weight_D: Floats, eps: float, normed_ND: Floats) -> None:
    """Root-mean-square normalisation of each row."""
    rows, width = rows_ND.shape
    for row in range(rows):
        squares = 0.0
        for column in range(width):
            squares += rows_ND[row, column] * rows_ND[row, column]
        scale = np.float32(1 / math.sqrt(squares / width + eps))
        for column in range(width):
            normed_ND[row, column] = rows_ND[row, column] * scale * weight_D[column]


@compiled
def move_matrices(
    command_B4HE: Floats,
    leak_HE: Floats,
    bias_HE: Floats,
    most: float,
    unfolds: int,
    least: float,
    state_BHEF: Floats,
    read_BHF: Floats,
) -> None:
    """One token of `MatrixRecurrence`: command activity in, what is read out, and the state moved on in place.

    `most` is the highest conductance, `least` what the mean square of a key is raised by.
    """
    rows, heads, keys, values = state_BHEF.shape
    for row in range(rows):
        for head in range(heads):
            squares = 0.0
            for e in range(keys):
                squares += command_B4HE[row, 1, head, e] * command_B4HE[row, 1, head, e]
            key_scale = 1 / math.sqrt(squares / keys + least)
            for f in range(values):
                read_BHF[row, head, f] = 0
            for e in range(keys):
                conductance = most / (1 + math.exp(-(command_B4HE[row, 3, head, e] + bias_HE[head, e])))
                total = leak_HE[head, e] + conductance
                if unfolds:
                    # One step keeps 1 / (1 + x); what n steps lose is that of one times 1 + kept + … + kept^(n - 1).
                    once = 1 / (1 + total / unfolds)
                    alpha, series = 1.0, 0.0
                    for _ in range(unfolds):
                        series += alpha
                        alpha *= once
                    lost = total / unfolds * once * series
                else:
                    alpha, lost = math.exp(-total), -math.expm1(-total)
                asked = command_B4HE[row, 0, head, e]
                query = np.float32(asked / (1 + math.exp(-asked)))
                key = np.float32(conductance / total * lost * key_scale * command_B4HE[row, 1, head, e])
                kept = np.float32(alpha)
                for f in range(values):
                    moved = kept * state_BHEF[row, head, e, f] + key * command_B4HE[row, 2, head, f]
                    state_BHEF[row, head, e, f] = moved
                    read_BHF[row, head, f] += query * moved
