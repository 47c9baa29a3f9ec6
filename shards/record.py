"""One row of a shard: a sample's tokens and what the teacher said about them. Numpy only.

Shape suffixes used across the house:
    B batch   P prompt tokens   R response tokens   N predicted positions   T decoder positions
    K kept ids a position   V vocabulary   D hidden width   H heads   L layers   M attention positions kept
    J numbers of a partition curve
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.contract import AttentionSpec

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSummary:
    """Head-mean attention rows of chosen teacher layers, reduced to what a student can match.

    Row n is the teacher row that predicts the n-th predicted position; where the contract asks for all rows, the rows
    of the prompt positions 1..P-2 stand before those, and N counts them too. Prompt keys are 1..P-1; key 0 is the
    attention sink and is kept apart. The mass of prompt keys that were not kept is `prompt - sum(weights)`.
    """

    positions_LNM: Int32
    """Key positions in 1..P-1 by falling weight; -1 where the row sees fewer keys."""
    weights_LNM: Float32
    """Weight of each kept key; 0 where the position is -1."""
    sink_LN: Float32
    """Weight of key 0."""
    prompt_LN: Float32
    """Weight of all prompt keys 1..P-1, kept or not."""
    entropy_LN: Float32
    """Entropy of the whole head-mean row, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A sample and its teacher signal.

    The N predicted positions are the response tokens `first_position .. first_position + N - 1`; row n holds the
    teacher's distribution for response token `first_position + n`, computed from everything before it.
    """

    sample_id: str
    prompt_ids_P: Int32
    response_ids_R: Int32
    first_position: int
    ids_NK: Int32
    """The kept ids: those of the exact head, then those that were drawn, either by falling log-probability (ties by
    rising id; where none is kept, by falling count). A row with fewer than K ends in -1."""
    logprobs_NK: Float32 | None
    """True log-probabilities in nats: the normaliser is the full softmax, never the kept ids. -inf where the id is -1;
    None where the contract's selection keeps none."""
    draws_NK: Int32 | None = None
    """How often an id was drawn, 0 for the exact head; None for selections without draws."""
    log_tail_N: Float32
    """log of the mass outside the exact head, from which draws are made; -inf where nothing is left, NaN where it is
    not known."""
    entropy_N: Float32
    """Entropy of the full distribution, in nats."""
    curve_NJ: Float32 | None = None
    """The tail's partition curve: log sum p_v^b over the ids v outside the exact head, at each exponent b of the
    contract's `curve`, then its slope d/db at each; None where the contract has no curve."""
    attention: AttentionSummary | None = None

    @property
    def coverage_N(self) -> Float64:
        """Probability mass of the kept ids, drawn ones included; NaN where no log-probabilities are kept."""
        if self.logprobs_NK is None:
            return np.full(self.positions, np.nan)
        mass_N: Float64 = np.exp(self.logprobs_NK.astype(np.float64)).sum(axis=1)
        return mass_N

    @property
    def labels_N(self) -> Int32:
        """The token that followed at each predicted position."""
        return self.response_ids_R[self.first_position : self.first_position + self.positions]

    @property
    def positions(self) -> int:
        """N, the number of predicted positions."""
        return int(self.ids_NK.shape[0])


def keys_in_sight(spec: AttentionSpec, *, positions: int, prompt_length: int) -> Int32:
    """How many prompt keys each row sees: all P - 1 of them, but rows of the prompt position t see t."""
    response_N = np.full(positions, prompt_length - 1, np.int32)
    if spec.rows == "response":
        return response_N
    return np.concatenate([np.arange(1, prompt_length - 1, dtype=np.int32), response_N])
